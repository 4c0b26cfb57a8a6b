"""The masks of a run: parameters, multipliers, Adam of both, and nothing of the model.

All ranks hold all of it, 16 bytes a gate, and step it alike: the gradients that are given to it are
whole. A model of 32 layers, 32 heads and 11,008 FFN channels has 357 thousand gates, 6 MB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.tensors import generator_of
from megatron_prune.shearing.constraint import Constraint, Warmup, without_lowest
from megatron_prune.shearing.hard_concrete import uniform
from megatron_prune.shearing.method import MaskRates, mask_method
from megatron_prune.shearing.units import Gated, blocks, count

EPSILON = 1e-8  # of Adam


class Masks:
    """Parameters [n] float32 of all gates, and of each multiplier [n'], on the CPU."""

    def __init__(
        self, method: str, constraint: Constraint, rates: MaskRates, seed: int, steps: int
    ) -> None:
        self.method, self.constraint, self.rates = mask_method(method), constraint, rates
        self._seed, self._steps, self._size = seed, steps, count(constraint.axes)
        self.parameters = self.method.start(self._size, generator_of(seed, "masks start"))
        self._multipliers = [torch.zeros(len(constraint.words)) for _ in self.method.rates[1:]]
        self._begin()

    def _begin(self) -> None:
        self.method.bound(self.parameters)
        for one in self._stepped().values():
            one.requires_grad_()
        groups = [
            {"params": [one], "maximize": name != "parameters"}  # multipliers rise
            for name, one in self._stepped().items()
        ]
        self._adam = torch.optim.Adam(groups, betas=self.method.betas, eps=EPSILON, foreach=False)

    def _stepped(self) -> dict[str, Tensor]:
        """All that is learned, by name, in the order of `MaskMethod.rates`."""
        named = {f"lambda {number}": one for number, one in enumerate(self._multipliers, 1)}
        return {"parameters": self.parameters, **named}

    @property
    def lambdas(self) -> Tensor:
        """[multipliers, n'] as they are."""
        rows = [one.detach() for one in self._multipliers]
        return torch.stack(rows) if rows else torch.zeros(0, len(self.constraint.words))

    @classmethod
    def at_rest(cls, method: str, axes: Sequence[Gated], saved: Mapping[str, Any]) -> Masks:
        """Masks that are judged only, by what `state` gave."""
        constraint = Constraint(axes=tuple(axes), warmup=Warmup())
        mask, *multipliers = mask_method(method).rates
        rates = MaskRates(mask=mask, lagrangian=tuple(multipliers))
        masks = cls(method, constraint, rates, seed=0, steps=0)
        masks._take(masks.parameters, saved, "parameters")
        return masks

    def order_by(self, ranks: Mapping[str, Tensor]) -> None:
        """Begin with parameters in the order of [rows, size] ranks, 0 to 1, by axis letter."""
        flat = torch.cat([ranks[axis.letter].reshape(-1) for axis in self.constraint.axes])
        self.parameters = self.method.ordered(flat.float())
        self._begin()

    # ---- gates -------------------------------------------------------------------------------

    def _share(self, step: int) -> float:
        return min(1.0, step / self._steps) if self._steps else 1.0

    def drawn(self, step: int, number: int) -> Tensor:
        """[n] the gates that microbatch ``number`` of a step (from 0) is trained with.

        They depend on seed, step and number alone; the gradient reaches the parameters.
        """
        u = None
        if self.method.has_noise:
            u = uniform(self._size, generator_of(self._seed, f"masks {step} {number}"))
        return self.method.drawn(self.parameters, u, self._share(step), self.constraint.axes)

    def by_axis(self, flat: Tensor) -> dict[str, Tensor]:
        return blocks(flat, self.constraint.axes)

    @torch.no_grad()
    def judged(self) -> dict[str, Tensor]:
        """The gates by axis letter, [rows, size], before any is shut."""
        return self.by_axis(self.method.judged(self.parameters.detach()))

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """By axis letter [rows, size]: what decides who stays, 0 or more; higher means keep."""
        return self.by_axis(self.method.score(self.parameters.detach()))

    @torch.no_grad()
    def present(self, step: int) -> dict[str, Tensor]:
        """By axis letter [rows, size]: how likely each unit is to stay, after so many steps."""
        return self.by_axis(self._presence(self.parameters.detach(), step))

    def _presence(self, a: Tensor, step: int) -> Tensor:
        return self.method.presence(a, self._share(step), self.constraint.axes)

    @torch.no_grad()
    def judged_as_expected(self, step: int) -> dict[str, Tensor]:
        """`judged`, of which as many are shut in each row as are expected to be."""
        present, scores, found = self.present(step), self.scores(), self.judged()
        if self.method.is_exact:
            return {letter: x * present[letter] for letter, x in found.items()}
        gone = {n: [round(float(x)) for x in (1 - p).sum(1)] for n, p in present.items()}
        return {n: without_lowest(x, gone[n], scores[n]) for n, x in found.items()}

    # ---- steps -------------------------------------------------------------------------------

    def constrain(self, gradient: Tensor, step: int) -> float:
        """Take the loss's gradient [n] and add the constraint's; the norm of all, multipliers too.

        Called on every rank with the same gradient.
        """
        gradients = [gradient]
        if self._multipliers:
            present = self.by_axis(self._presence(self.parameters, step))
            lagrangian = self.constraint.lagrangian(present, self._multipliers, step)
            of = [self.parameters, *self._multipliers]
            own, *rising = torch.autograd.grad(lagrangian, of)
            gradients = [own + gradient, *rising]
        for one, its in zip(self._stepped().values(), gradients):
            one.grad = its
        return float(torch.linalg.vector_norm(torch.cat(gradients)))

    @torch.no_grad()
    def step(self, step: int, share: float, scale: float) -> None:
        """Move masks down and multipliers up.

        Args:
            share: of the learning rates, as the schedule has it.
            scale: of the gradients, as clipping has it.
        """
        share *= self.rates.share(step)
        rates = self.rates.mask, *self.rates.lagrangian
        for group, rate in zip(self._adam.param_groups, rates, strict=True):
            group["lr"] = rate * share
        for one in self._stepped().values():
            assert one.grad is not None, "`constrain` comes before"
            one.grad.mul_(scale)
        self._adam.step()
        self.method.bound(self.parameters)
        if self._multipliers and self.rates.cap is not None:
            self._multipliers[0].clamp_(-self.rates.cap, self.rates.cap)

    # ---- checkpoints -------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a run continues with, copied; of the multipliers [multipliers, n'] each."""
        values = {"parameters": self.parameters.detach().clone(), "lambdas": self.lambdas}
        adam = {}
        if self.parameters in self._adam.state:
            of = self._adam.state
            adam["parameters"] = {key: x.clone() for key, x in of[self.parameters].items()}
            rows = [of[one] for one in self._multipliers]
            adam["lambdas"] = (
                {key: torch.stack([row[key] for row in rows]) for key in rows[0]} if rows else {}
            )
        return {**values, "adam": adam}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave; raises ValueError for another number of gates."""
        lambdas = self.lambdas
        self._take(self.parameters, state, "parameters")
        self._take(lambdas, state, "lambdas")
        for one, row in zip(self._multipliers, lambdas):
            one.copy_(row)
        if not state["adam"]:
            return
        of = self._adam.state
        of[self.parameters] = {k: x.clone() for k, x in state["adam"]["parameters"].items()}
        for number, one in enumerate(self._multipliers):
            of[one] = {k: x[number].clone() for k, x in state["adam"]["lambdas"].items()}

    @torch.no_grad()
    def _take(self, one: Tensor, saved: Mapping[str, Any], name: str) -> None:
        found = saved[name]
        if found.shape != one.shape or found.dtype != one.dtype or not bool(found.isfinite().all()):
            raise ValueError(
                f"{name} of masks are {tuple(found.shape)} {found.dtype}; wanted finite "
                f"{tuple(one.shape)} {one.dtype}"
            )
        one.copy_(found)
