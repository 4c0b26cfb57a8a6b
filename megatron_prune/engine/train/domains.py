"""Domains on Megatron's datasets: checked, drawn from, measured, balanced.

A domain is one or several corpora, each a GPTDataset of one epoch, joined; the datasets are built
once, and `data.domains.DomainOrder` decides which sample of which domain is next. So weights change
without building anything, and the whole of it is a few numbers in the checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_prune.data.domain_recipe import (
    DomainRecipe,
    other_windows,
    read_recipe,
    target_losses,
)
from megatron_prune.data.domains import (
    DomainOrder,
    UpdateRule,
    check_rule,
    epoch_order,
    updated_weights,
    weighted_mean,
)
from megatron_prune.data.sidecar import CorpusFacts, check_corpus
from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.engine.failures import on_first_rank
from megatron_prune.engine.forward.microbatches import microbatch
from megatron_prune.engine.forward.windows import microbatch_results, microbatches_at_once
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.train.checkpoint import Start
from megatron_prune.engine.train.corpora import (
    build_parts,
    check_corpora,
    check_split,
    dataset_config,
)
from megatron_prune.engine.train.metrics import MetricsLog
from megatron_prune.engine.train.options import TrainOptions
from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.model import axes
from megatron_prune.model.shape import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the corpora of domains are cut into samples; the fields are flags of ``train``."""

    seed: int
    seq_length: int
    split: str
    eod_mask_loss: bool
    cache: Path


def cut_of(options: TrainOptions) -> Cut:
    return Cut(
        seed=options.seed,
        seq_length=options.seq_length,
        split=options.split,
        eod_mask_loss=options.eod_mask_loss,
        cache=options.cache_path,
    )


def rule_of(options: TrainOptions) -> UpdateRule:
    return UpdateRule(
        eta=options.domain_eta,
        smoothing=options.domain_smoothing,
        floor=options.domain_weight_floor,
        cap=options.domain_weight_cap,
        clip=options.domain_clip,
    )


# ---- checks, before a weight is read -----------------------------------------------------------


def check_data(
    options: TrainOptions, start: Start, model_path: Path | None, config: ModelConfig
) -> list[CorpusFacts]:
    """Look at every corpus of ``--data-path`` or ``--domains``.

    Raises:
        ConfigError: the checkpoint's run had domains and this one has none, or the other way.
        ConfigError, DamagedError: see `check_corpora`, `read_recipe`, `target_losses`, `check_rule`
            and `check_domains`.
    """
    vocab_size = config.shape.vocab_size
    if start.state is not None:
        had = start.state.get("domains") is not None
        if had != (options.domains is not None):
            raise ConfigError(
                f"{start.directory}: its run was one {'with' if had else 'without'} --domains, "
                f"this one is {'without' if had else 'with'}; give the same flags to continue it, "
                "or take its weights into a new run with --finetune"
            )
    if options.domains is None:
        return check_corpora(options, model_path, vocab_size)
    recipe = read_recipe(options.domains)
    if options.domain_weighting == "dynamic":
        target_losses(recipe, axes.count_parameters(config))
        check_rule(rule_of(options), recipe.weights)
        windows = {key: getattr(options, key) for key in ("seq_length", "split", "seed")}
        if other := other_windows(recipe, windows):
            print(other, file=sys.stderr)
    return check_domains(
        recipe,
        cut_of(options),
        model_path,
        vocab_size,
        training=True,
        validation=bool(options.eval_iters),
    )


def check_domains(
    recipe: DomainRecipe,
    cut: Cut,
    model_path: Path | None,
    vocab_size: int,
    *,
    training: bool,
    validation: bool,
) -> list[CorpusFacts]:
    """Every corpus of the recipe is whole, of this tokenizer, and has a sample in each part asked.

    Returns:
        The facts of the corpora to train on.

    Raises:
        ConfigError: with the domain and the corpus.
        DamagedError: see `check_corpus`.
    """
    digest = load_tokenizer(model_path).digest if model_path is not None else None
    ranges, found = check_split(cut.split), []
    for domain in recipe.domains:
        for prefix in domain.prefixes:
            facts = check_corpus(prefix, digest, vocab_size)
            found.append(facts)
            if cut.eod_mask_loss and facts.eod is None:
                raise ConfigError(f"--eod-mask-loss: {prefix}.json does not tell the EOD token")
            if training:
                _check_part(domain.name, prefix, "training", ranges[0], cut)
            if validation and not domain.validation:
                _check_part(domain.name, prefix, "validation", ranges[1], cut)
        for prefix in domain.validation if validation else ():
            check_corpus(prefix, digest, vocab_size)
            _check_part(domain.name, prefix, "validation", (0.0, 1.0), cut)
    return found


def _check_part(
    name: str, prefix: str, part: str, share: tuple[float, float] | None, cut: Cut
) -> None:
    index = IndexedDataset(prefix)
    lengths = index.sequence_lengths
    first, last = (round(edge * float(len(lengths))) for edge in share or (0.0, 0.0))
    tokens, wanted = int(np.sum(lengths[first:last], dtype=np.int64)), cut.seq_length + 1
    if tokens >= wanted:
        return
    own = "" if part == "training" else ", or validation corpora of its own in the recipe"
    raise ConfigError(
        f"domain {name}: the {part} part of {prefix} under --split {cut.split} is {last - first} "
        f"documents of {tokens} tokens; one sample takes {wanted} (--seq-length + 1): give more "
        f"text or another --split{own}"
    )


# ---- datasets ----------------------------------------------------------------------------------


class Joined:
    """One epoch of several GPTDatasets as one; [] gives a sample."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        part = int(np.searchsorted(self._ends, at, side="right"))
        begin = int(self._ends[part - 1]) if part else 0
        sample: dict[str, Tensor] = self._parts[part][at - begin]
        return sample


def _one_epoch(
    prefix: str, share: tuple[float, float], part: int, cut: Cut, vocab_size: int, eod: int | None
) -> Any:
    """A GPTDataset of one part, each sample once; on all ranks."""
    config = dataset_config(
        seed=cut.seed,
        seq_length=cut.seq_length,
        split=cut.split,
        cache=cut.cache,
        eod_mask_loss=cut.eod_mask_loss,
        vocab_size=vocab_size,
        eod=eod,
        blend=([prefix], None),
    )
    config.split_matrix = [share if number == part else None for number in range(3)]
    return build_parts(config, [None, None, None])[part]


def build_domains(
    recipe: DomainRecipe, cut: Cut, facts: Sequence[CorpusFacts], vocab_size: int, *, part: str
) -> dict[str, Joined]:
    """The samples of each domain, of its ``training`` or its ``validation`` part."""
    ranges, eod = check_split(cut.split), facts[0].eod
    found = {}
    for domain in recipe.domains:
        prefixes, share, number = domain.prefixes, ranges[0], 0
        if part == "validation":
            share, number = ranges[1], 1
            if domain.validation:
                prefixes, share = domain.validation, (0.0, 1.0)
        assert share is not None  # `check_domains`
        found[domain.name] = Joined(
            [_one_epoch(prefix, share, number, cut, vocab_size, eod) for prefix in prefixes]
        )
    return found


class DomainMix:
    """The samples of a run in the order they are trained on; [consumed] is the next one."""

    def __init__(self, domains: Mapping[str, Joined], order: DomainOrder) -> None:
        self._domains, self.order = list(domains.values()), order

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        domain, number = self.order.locate(sample)
        return self._domains[domain][self.order.place(domain, number)]


# ---- losses ------------------------------------------------------------------------------------


def validation_windows(name: str, seed: int, size: int, most: int | None) -> list[int]:
    """The samples of a domain's validation part that are looked at: always the same."""
    return epoch_order(seed, name, 0, size)[:most].tolist()


@torch.no_grad()
def domain_loss(
    model: Any, samples: Joined, windows: list[int], groups: Groups, micro_batch_size: int
) -> float:
    """Mean loss of the unmasked tokens of the windows, in nats; the same on every rank.

    The last step is filled up with windows that do not count, so that any number of windows can be
    spread over any number of ranks.
    """
    per_step = micro_batch_size * groups.data_parallel
    steps = -(-len(windows) // per_step)
    at_once = microbatches_at_once(groups)
    sums = torch.zeros(2, dtype=torch.float64, device=groups.device)
    model.eval()
    for first in range(0, steps, at_once):
        count = min(first + at_once, steps) - first
        batches = _batches(samples, windows, first, count, groups, micro_batch_size)
        length = len(samples[windows[0]]["tokens"])
        for found in microbatch_results(
            model, batches, count, micro_batch_size, length, _nats_and_tokens
        ):
            sums += found
    dist.all_reduce(sums)  # tensor-parallel ranks hold the same sums, which cancels
    total, tokens = sums.tolist()
    return total / tokens if tokens else float("nan")


def _batches(
    samples: Joined, windows: list[int], first: int, count: int, groups: Groups, micro: int
) -> Iterator[tuple[Tensor, ...]]:
    for step in range(first, first + count):
        begin = (step * groups.data_parallel + groups.dp_rank) * micro
        rows = [samples[window] for window in windows[begin : begin + micro]]
        if len(rows) < micro:
            first_row = samples[windows[0]]
            filler = {**first_row, "loss_mask": torch.zeros_like(first_row["loss_mask"])}
            rows += [filler] * (micro - len(rows))
        yield microbatch(rows, groups)[:3]


def _nats_and_tokens(losses_bs: Tensor, mask_bs: Tensor) -> Tensor:
    kept = torch.where(mask_bs > 0, losses_bs.double(), 0.0)  # padding's may be anything
    return torch.stack([kept.sum(), mask_bs.double().sum()])


# ---- a run's -----------------------------------------------------------------------------------


class DomainLoading:
    """What a training run does about its domains: draw, measure, reweight, tell, save."""

    def __init__(
        self,
        options: TrainOptions,
        groups: Groups,
        config: ModelConfig,
        facts: Sequence[CorpusFacts],
        state: Mapping[str, Any] | None,
    ) -> None:
        assert options.domains is not None
        path = options.domains
        self._options, self._groups = options, groups
        self.recipe = on_first_rank(groups.ranks, lambda: read_recipe(path))
        self.is_dynamic = options.domain_weighting == "dynamic"
        self.targets: dict[str, float] = {}
        if self.is_dynamic:
            parameters = axes.count_parameters(config)
            self.targets = on_first_rank(
                groups.ranks, lambda: target_losses(self.recipe, parameters)
            )
        vocab_size, cut = config.shape.vocab_size, cut_of(options)
        training = build_domains(self.recipe, cut, facts, vocab_size, part="training")
        sizes = {name: len(samples) for name, samples in training.items()}
        self.order = DomainOrder(sizes, self.recipe.weights, options.seed)
        self.train = DomainMix(training, self.order)
        self._valid: dict[str, Joined] = {}
        if options.eval_iters:
            self._valid = build_domains(self.recipe, cut, facts, vocab_size, part="validation")
        consumed = 0
        if state is not None:
            self.order.restore(state["domains"])
            consumed = state["consumed_samples"]
        self._epochs = self.order.epochs(consumed)  # whole ones, that were told

    def state(self, consumed: int) -> dict[str, Any]:
        return {"domains": self.order.state(consumed)}

    def is_due(self, iteration: int) -> bool:
        """Whether the weights change after this step."""
        return self.is_dynamic and iteration % self._options.domain_update_interval == 0

    def tell(self, log: MetricsLog, consumed: int) -> None:
        """Say which domains have been drawn from once more in whole."""
        told, self._epochs = self._epochs, self.order.epochs(consumed)
        for name, epochs in self._epochs.items():
            if epochs > told[name]:
                log.say(
                    f"domain {name}: exhausted, all its {self.order.sizes[name]} samples have been "
                    f"drawn {epochs} x; epoch {epochs + 1} begins, in another order"
                )

    def _losses(self, model: Any) -> dict[str, float]:
        options, copies = self._options, self._groups.data_parallel
        most, losses = options.eval_iters * options.batch_size(copies), {}
        for name, samples in self._valid.items():
            windows = validation_windows(name, options.seed, len(samples), most)
            loss = domain_loss(model, samples, windows, self._groups, options.micro_batch_size)
            if not np.isfinite(loss):
                raise DamagedError(
                    f"domain {name}: its validation loss is {loss}; stopped, weights unchanged. "
                    "Look for values that are not finite in the weights, or lower --lr"
                )
            losses[name] = loss
        return losses

    def loss(self, model: Any) -> float:
        return weighted_mean(self._losses(model), self.recipe.weights)

    def validate(self, model: Any, log: MetricsLog, iteration: int, consumed: int) -> float:
        """Measure every domain, change the weights where that is due, tell.

        Returns:
            The mean of the losses by the recipe's weights, whatever they are now.

        Raises:
            DamagedError: a loss that is not a number.
        """
        losses = self._losses(model)
        if self.is_due(iteration):
            weights = updated_weights(
                self.order.weights, losses, self.targets, rule_of(self._options)
            )
            self.order.reweight(consumed, weights)
        log.domains(iteration, consumed, self._table(losses, consumed))
        return weighted_mean(losses, self.recipe.weights)

    def _table(self, losses: Mapping[str, float], consumed: int) -> dict[str, dict[str, float]]:
        drawn = self.order.drawn(consumed)
        table = {}
        for name, loss in losses.items():
            row = {"loss": loss}
            if name in self.targets:
                row["target"] = self.targets[name]
            table[name] = row | {
                "weight": self.order.weights[name],
                "tokens": drawn[name] * self._options.seq_length,
                "token share": drawn[name] / max(consumed, 1),
                "epochs": drawn[name] / self.order.sizes[name],
            }
        return table
