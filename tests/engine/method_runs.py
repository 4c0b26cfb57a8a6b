"""Short runs of ``shear``, what they leave, and one of them by transformers and plain torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.engine import runs

LAYERS, HEADS, WIDTH, FFN = 4, 6, 8, 96  # of the pico model "gqa"
CUT = (
    "--ffn-hidden-size-remain", 72, "--num-attention-heads-remain", 3, "--num-layers-remain", 3,
)  # fmt: skip
DETERMINISTIC = ("--mask-method", "deterministic", "--mask-lr", 0.05)
PROJECTED = ("--mask-method", "projected")
FROZEN = ("--freeze-weights",)
SELF = ("--distill-self", 2)


def words(load: object, save: object, corpus: object, *more: object) -> list[str]:
    """``shear`` of a pico model, six steps."""
    return ["shear", *runs.words(load, save, corpus, *more)[1:]]


def state(save: Path, iteration: int = 6) -> Mapping[str, Any]:
    """What the run's masks continue with."""
    from megatron_prune.engine.train.checkpoint import training_state

    found = training_state(save / f"iter_{iteration:07d}")
    assert found is not None
    masks: Mapping[str, Any] = found["masks"]
    return masks


class PlainLoop:
    """Deterministic masks on frozen weights that learn from the model without them, by the paper's
    formulas: heads, FFN channels and layers of "gqa", multiplied into the weights behind them."""

    def __init__(self, model: Any, z: Tensor, steps: int, clip: float, weight: float) -> None:
        self._model, self._steps, self._clip, self._weight = model, steps, clip, weight
        self.z = z.clone().requires_grad_()
        self.lambdas = [torch.zeros(3, requires_grad=True) for _ in range(3)]
        groups = [{"params": [self.z], "lr": 0.05}]
        for one, rate in zip(self.lambdas, (2e-2, 4e-1, 2e-2)):
            groups.append({"params": [one], "lr": rate, "maximize": True})
        self._adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0)
        self._rates = [group["lr"] for group in groups]

    def _blocks(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([LAYERS * HEADS, LAYERS * FFN, LAYERS])
        return [part.view(-1, size) for part, size in zip(parts, (HEADS, FFN, LAYERS))]

    def _gated(self) -> dict[str, Tensor]:
        heads, ffn, layers = self._blocks(self.z + (self.z.relu() - self.z).detach())
        given = dict(self._model.named_parameters())
        for n in range(LAYERS):
            at = f"model.layers.{n}"
            of_head = heads[n].repeat_interleave(WIDTH) * layers[0, n]
            given[f"{at}.self_attn.o_proj.weight"] = (
                given[f"{at}.self_attn.o_proj.weight"] * of_head
            )
            name = f"{at}.mlp.down_proj.weight"
            given[name] = given[name] * ffn[n] * layers[0, n]
        return given

    def _lagrangian(self, step: int, warmup: int) -> Tensor:
        mu = 0.5 - 0.45 * math.sqrt(step / self._steps)
        m = self.z + (self.z.relu() - self.z).detach()
        s = torch.sigmoid((m - mu) * 2.4 / mu) * 1.2 - 0.1
        s = s + (s.clamp(0, 1) - s).detach()
        share, total = min(1.0, step / warmup), torch.zeros(())
        for n, (rows, gone) in enumerate(zip(self._blocks(s), (1 / 2, 1 / 4, 1 / 4))):
            far = 1 - rows.mean(1) - gone * share
            l1, l2, l3 = (one[n] for one in self.lambdas)
            total = total + (l1 * far + l2 * far**2).mean() + l3 * (rows * (1 - rows)).mean()
        return total

    def step(self, batch: Tensor, number: int, warmup: int, share: float) -> dict[str, float]:
        tokens, targets = batch[:, :-1], batch[:, 1:].reshape(-1)
        with torch.no_grad():
            teacher = self._model(tokens).logits.flatten(0, 1).log_softmax(-1)
        found = torch.func.functional_call(self._model, self._gated(), (tokens,)).logits
        student = found.flatten(0, 1).log_softmax(-1)
        lm = torch.nn.functional.nll_loss(student, targets)
        kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
        loss = lm + self._weight * kl + self._lagrangian(number, warmup)
        self._adam.zero_grad()
        loss.backward()
        every = [self.z, *self.lambdas]
        norm = torch.nn.utils.clip_grad_norm_(every, self._clip)
        for group, rate in zip(self._adam.param_groups, self._rates):
            group["lr"] = rate * share
        self._adam.step()
        with torch.no_grad():
            self.z.clamp_(min=-0.1)
        return {
            "lm loss": float(lm.detach()),
            "kl loss": float(kl.detach()),
            "grad-norm": float(norm),
        }
