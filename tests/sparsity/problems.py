"""A layer to prune: weights whose outputs differ in size, inputs that hang together, and a few
that never fire; and every way to prune it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prune.solve.kselect import ALONE, Dealt
from megatron_prune.sparsity.method import Asked, How, Inputs, Pattern, Prepared, Sparse, method_for

TOKENS, INPUTS, DEAD = 600, 96, [5, 70]
HALF = Asked(share=0.5)
TWO_OF_FOUR = Asked(share=0.5, pattern=Pattern(keep=2, group=4))
WAYS = {
    "magnitude": ("magnitude", How()),
    "wanda": ("wanda", How()),
    "variant": ("wanda", How(variant=True)),
    "sparsegpt": ("sparsegpt", How(block_size=40)),
    "magnitude seq": ("magnitude", How(weight_update="seq", block_size=40)),
    "magnitude iter": ("magnitude", How(weight_update="iter", block_size=40)),
    "wanda seq": ("wanda", How(weight_update="seq", block_size=40)),
    "wanda iter": ("wanda", How(weight_update="iter", block_size=40)),
    "wanda refit": ("wanda", How(refit=True)),
    "sparsegpt refit": ("sparsegpt", How(refit=True)),
    "admm": ("admm", How()),
    "alps": ("alps", How()),
}
PATTERNED = [way for way in WAYS if way != "variant"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Matrices [O, I] that share an input, and what is known of it."""

    weights: list[Tensor]
    inputs: Inputs

    def prepared(self, way: str) -> Prepared:
        name, how = WAYS[way]
        method = method_for(name, how)
        return {} if method.needs == "weights" else method.prepare(self.inputs, how)

    def solved(
        self,
        way: str,
        asked: Asked,
        weights: list[Tensor] | None = None,
        prepared: Prepared | None = None,
        dealt: Dealt = ALONE,
    ) -> list[Sparse]:
        name, how = WAYS[way]
        prepared = self.prepared(way) if prepared is None else prepared
        return method_for(name, how).prune(weights or self.weights, prepared, asked, how, dealt)

    def error(self, number: int, weight: Tensor) -> float:
        """Of a matrix that stands for one of these: of the outputs' energy what is lost."""
        assert self.inputs.gram_II is not None
        gram, dense = self.inputs.gram_II.double(), self.weights[number].double()
        lost = weight.double() - dense
        return float(((lost @ gram) * lost).sum() / ((dense @ gram) * dense).sum())


def make_problem(rows: tuple[int, ...] = (48, 16), dead: bool = True, seed: int = 0) -> Problem:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(INPUTS, INPUTS, generator=draw) / INPUTS**0.5 + 0.5 * torch.eye(INPUTS)
    x = torch.randn(TOKENS, INPUTS, generator=draw) @ mix
    x *= 0.2 + 2 * torch.rand(INPUTS, generator=draw)
    if dead:
        x[:, DEAD] = 0
    scale = torch.randn(sum(rows), 1, generator=draw).mul(0.7).exp()
    weight = torch.randn(sum(rows), INPUTS, generator=draw) * scale
    squares = x.double().square().sum(0) / 16
    inputs = Inputs(windows=16, squares_I=squares, gram_II=x.T @ x)
    return Problem(weights=list(weight.split(list(rows))), inputs=inputs)
