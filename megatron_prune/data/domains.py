"""Domains that balance themselves: which weight each has, and which sample comes next.

Dynamic batch loading of Xia et al. 2023 (Sheared LLaMA, arXiv:2310.06694, algorithm 1): domains
whose validation loss is furthest above its target are drawn from more often. This file is pure
arithmetic in float64; the datasets and the losses are `engine.domains`'.

The order of samples is decided one by one, as Megatron's ``build_blending_indices`` does: the
domain comes next that is furthest behind its weight. A change of weights begins a segment; what a
domain was behind or ahead by is carried over, so that small weights add up over short segments.
In a domain every sample comes once before any comes again, in another order in each epoch.

Shape suffix: n domains.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.model.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

WEIGHTINGS = ("dynamic", "constant")
_BLOCK = 1024  # samples located at a time
_TINY = 1e-300  # a weight of 0 stays one, and divides nothing


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """How losses change weights.

    Attributes:
        eta: how strongly; 1 in the paper.
        smoothing: c, the share that is spread evenly; 1e-4 in the paper's code.
        floor, cap: no weight leaves this range.
        clip: count only what is above the target, max(0, loss - target), as the paper's
            algorithm 1; its code counts what is below, too, and so do we without ``clip``.
    """

    eta: float = 1.0
    smoothing: float = 1e-4
    floor: float = 0.0
    cap: float = 1.0
    clip: bool = False


def check_rule(rule: UpdateRule, weights: Mapping[str, float]) -> None:
    """Refuse bounds that no weights can keep to.

    Args:
        weights: of each domain at the start, summing to 1.

    Raises:
        ConfigError: with the numbers.
    """
    count, floor, cap = len(weights), rule.floor, rule.cap
    if not 0 <= floor <= cap <= 1:
        raise ConfigError(
            f"--domain-weight-floor {floor:g} and --domain-weight-cap {cap:g}: wanted "
            "0 <= floor <= cap <= 1"
        )
    if count * floor > 1:
        raise ConfigError(
            f"--domain-weight-floor {floor:g}: {count} domains would take {count * floor:g} of 1; "
            f"wanted {math.floor(1e4 / count) / 1e4:g} or less"
        )
    if count * cap < 1:
        raise ConfigError(
            f"--domain-weight-cap {cap:g}: {count} domains would take {count * cap:g} of 1 at "
            f"most; wanted {math.ceil(1e4 / count) / 1e4:g} or more"
        )
    for name, weight in weights.items():
        if not floor - 1e-12 <= weight <= cap + 1e-12:
            raise ConfigError(
                f"domain {name}: starts with the weight {weight:.4g} (of 1), outside of "
                f"--domain-weight-floor {floor:g} and --domain-weight-cap {cap:g}"
            )


def updated_weights(
    weights: Mapping[str, float],
    losses: Mapping[str, float],
    targets: Mapping[str, float],
    rule: UpdateRule,
) -> dict[str, float]:
    """The weights after losses were measured.

    ``w' = (1 - c) softmax(log w + eta (loss - target)) + c / n``, then, if a weight left
    [floor, cap], the nearest weights in proportion that do not: ``clip(s w', floor, cap)`` with the
    s that makes them sum to 1.

    Raises:
        DamagedError: a loss that is not a number, with its domain.
    """
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise DamagedError(f"domain {name}: its validation loss is {loss}; weights unchanged")
    names = list(weights)
    old_n = np.array([weights[name] for name in names], dtype=np.float64)
    excess_n = np.array([losses[name] - targets[name] for name in names], dtype=np.float64)
    if rule.clip:
        excess_n = np.maximum(excess_n, 0.0)
    logits_n = np.log(np.maximum(old_n, _TINY)) + rule.eta * excess_n
    raised_n = np.exp(logits_n - logits_n.max())
    new_n = (1 - rule.smoothing) * raised_n / raised_n.sum() + rule.smoothing / len(names)
    return dict(zip(names, _bounded(new_n, rule.floor, rule.cap).tolist()))


def _bounded(weights_n: NDArray[np.float64], floor: float, cap: float) -> NDArray[np.float64]:
    """``clip(s w, floor, cap)`` that sums to 1; the weights as they are where they fit."""
    if bool(((weights_n >= floor) & (weights_n <= cap)).all()):
        return weights_n
    w = np.maximum(weights_n, _TINY)
    scales = np.sort(np.concatenate([floor / w, cap / w]))  # the sum is linear in s between them
    sums = np.clip(scales[:, None] * w, floor, cap).sum(1)
    return np.clip(np.interp(1.0, sums, scales) * w, floor, cap)


def epoch_order(seed: int, name: str, epoch: int, size: int) -> NDArray[np.int64]:
    """The order of a domain's samples in one epoch: a permutation of range(size).

    Depends on nothing else; numpy has frozen this generator.
    """
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    generator = np.random.RandomState([seed % 2**32, word, epoch])
    return generator.permutation(size).astype(np.int64)


class DomainOrder:
    """Which domain each sample of a run is drawn from, and which of its samples it is.

    Memory: 10 bytes a sample since `drawn` was last asked for, and 8 bytes a sample of one epoch of
    each domain. Time: 2 microseconds a sample with a few domains.
    """

    def __init__(self, sizes: Mapping[str, int], weights: Mapping[str, float], seed: int) -> None:
        """
        Args:
            sizes: samples of one epoch of each domain, each 1 or more.
            weights: of each domain, summing to 1.
        """
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"domain {name}: no sample to train on; give it more text")
        self.sizes, self.weights, self.seed = dict(sizes), dict(weights), seed
        self._names, count = list(self.sizes), len(self.sizes)
        self._start = 0  # of the segment: the first sample drawn with these weights
        self._expected = np.zeros(count)  # samples up to there by the weights
        self._before = np.zeros(count, dtype=np.int64)  # and as drawn
        self._forget(0, np.zeros(count, dtype=np.int64))
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def _forget(self, first: int, counts: NDArray[np.int64]) -> None:
        """Hold samples from ``first`` on; ``counts`` were drawn in this segment before it."""
        self._first, self._counts, self._ahead = first, counts, counts.copy()
        self._domains = np.zeros(0, dtype=np.int16)
        self._numbers = np.zeros(0, dtype=np.int64)

    def _extend(self) -> None:
        """Locate the next samples, by the rule of Megatron's ``build_blending_indices``."""
        weights, before = list(self.weights.values()), self._before.tolist()
        behind = (self._expected - self._before).tolist()
        ahead = self._ahead.tolist()  # plain numbers: arrays this small cost more than they save
        domains, numbers = [], []
        position = self._first + len(self._domains) - self._start
        for at in range(position, position + _BLOCK):
            domain, most = 0, -math.inf
            for i, weight in enumerate(weights):
                error = weight * max(at, 1) - ahead[i] + behind[i]
                if error > most:
                    domain, most = i, error
            domains.append(domain)
            numbers.append(before[domain] + ahead[domain])
            ahead[domain] += 1
        self._ahead = np.array(ahead, dtype=np.int64)
        self._domains = np.concatenate([self._domains, np.array(domains, dtype=np.int16)])
        self._numbers = np.concatenate([self._numbers, np.array(numbers, dtype=np.int64)])

    def locate(self, sample: int) -> tuple[int, int]:
        """The domain of the run's sample, and how many of that domain came before it."""
        at = sample - self._first
        if at < 0:
            raise IndexError(f"sample {sample} lies before sample {self._first}")
        while at >= len(self._domains):
            self._extend()
        return int(self._domains[at]), int(self._numbers[at])

    def place(self, domain: int, number: int) -> int:
        """Where the ``number``-th sample drawn from a domain lies among its samples."""
        name = self._names[domain]
        epoch, at = divmod(number, self.sizes[name])
        if self._orders.get(domain, (-1,))[0] != epoch:
            self._orders[domain] = epoch, epoch_order(self.seed, name, epoch, self.sizes[name])
        return int(self._orders[domain][1][at])

    def _count(self, consumed: int) -> NDArray[np.int64]:
        """Forget what lies before ``consumed``; drawn of each domain in this segment until then."""
        assert consumed >= self._first, (consumed, self._first)
        if consumed > self._first:
            self.locate(consumed - 1)
        held = self._domains[: consumed - self._first]
        counts = self._counts + np.bincount(held, minlength=len(self.sizes))
        rest = self._domains[len(held) :], self._numbers[len(held) :]
        ahead = self._ahead
        self._forget(consumed, counts)
        self._ahead, (self._domains, self._numbers) = ahead, rest
        return counts

    def drawn(self, consumed: int) -> dict[str, int]:
        """Samples of each domain among the first ``consumed`` of the run; exact."""
        return dict(zip(self.sizes, (self._before + self._count(consumed)).tolist()))

    def epochs(self, consumed: int) -> dict[str, int]:
        """How often each domain has been drawn from in whole."""
        return {name: n // self.sizes[name] for name, n in self.drawn(consumed).items()}

    def expected(self, consumed: int) -> dict[str, float]:
        """The same by the weights that held."""
        weights = np.array(list(self.weights.values()))
        return dict(zip(self.sizes, (self._expected + weights * (consumed - self._start)).tolist()))

    def reweight(self, consumed: int, weights: Mapping[str, float]) -> None:
        """From sample ``consumed`` on draw with other weights; a new segment."""
        drawn, expected = self.drawn(consumed), self.expected(consumed)
        self._before = np.array(list(drawn.values()), dtype=np.int64)
        self._expected = np.array(list(expected.values()))
        self._start, self.weights = consumed, {name: weights[name] for name in self.sizes}
        self._forget(consumed, np.zeros(len(self.sizes), dtype=np.int64))

    def state(self, consumed: int) -> dict[str, Any]:
        """What `restore` takes up after ``consumed`` samples; plain types only."""
        counts = self._count(consumed)
        return {
            "sizes": dict(self.sizes),
            "weights": dict(self.weights),
            "seed": self.seed,
            "start": self._start,
            "expected": self._expected.tolist(),
            "before": self._before.tolist(),
            "consumed": consumed,
            "counts": counts.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a saved order.

        Raises:
            ConfigError: it is one of other domains, other data or another seed.
        """
        saved = {"sizes": dict(state["sizes"]), "seed": state["seed"]}
        for key, found in (("sizes", self.sizes), ("seed", self.seed)):
            # a reordered table is equal to the first, and its numbers are not
            if saved[key] != found or list(saved["sizes"]) != list(self.sizes):
                raise ConfigError(
                    f"the checkpoint's domains are others: {_difference(key, saved[key], found)}; "
                    "give the recipe, --split, --seq-length and --seed of the run before, or start "
                    "anew with --finetune"
                )
        self.weights = {name: float(state["weights"][name]) for name in self.sizes}
        self._start = int(state["start"])
        self._expected = np.array(state["expected"], dtype=np.float64)
        self._before = np.array(state["before"], dtype=np.int64)
        self._forget(int(state["consumed"]), np.array(state["counts"], dtype=np.int64))


def _difference(key: str, saved: Any, now: Any) -> str:
    if key == "seed":
        return f"seed {saved}, now {now}"
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if not names:
        return f"in the order {', '.join(saved)}, now {', '.join(now)}"
    return "samples an epoch of " + ", ".join(
        f"{name} {saved.get(name, 'none')}, now {now.get(name, 'none')}" for name in names
    )


def weighted_mean(losses: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The mean of losses by weights, which need not sum to 1."""
    total = math.fsum(weights[name] for name in losses)
    return math.fsum(losses[name] * weights[name] for name in losses) / total


def shares(weights: Sequence[float]) -> list[float]:
    """Positive numbers, divided by their sum."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]
