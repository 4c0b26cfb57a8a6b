"""Score the units of a model: what a plan decides by.

  megatron-prune score --load llama --data calibration.jsonl --criterion activation,wanda \\
      --save scores.safetensors
  torchrun --nproc-per-node 8 -m megatron_prune score --load llama --data calibration.jsonl \\
      --tensor-model-parallel-size 8 --criterion wanda,perplexity --save scores.safetensors

Scores are the same at any TP, PP and DP within rounding. One file serves many plans; started again
with more criteria, the same model and the same data, it is added to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.criteria import SCORED
from megatron_prune.errors import ConfigError, DamagedError, PlanError
from megatron_prune.flags import flag
from megatron_prune.model.lazy import Tensor
from megatron_prune.planning.scores import Scores, criteria_in, load_scores, scores_bytes
from megatron_prune.stages.common import agree_on_start, check_output_file, opened
from megatron_prune.stages.console import SILENT, Console
from megatron_prune.stages.sampling import Scoring

if TYPE_CHECKING:
    from megatron_prune.engine.groups import Groups
    from megatron_prune.engine.observe.score import ScoreOptions as How
    from megatron_prune.sources.source import Source

_REMOVING = tuple(name for name, needs in SCORED.items() if needs.removal)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Scoring):
    save: Path = flag("a .safetensors file", metavar="SCORES")
    overwrite: bool = flag("replace scores of another model or other data", default=False)
    criterion: str = flag(
        f"any of {', '.join(SCORED)}; or all that an expression names, as plan takes it",
        metavar="NAME[,NAME...]",
    )


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the file holds now; as text, the axes of each criterion."""

    scores: Scores

    def __str__(self) -> str:
        axes = self.scores.criteria.items()
        return "\n".join(f"{name:<18} axes {' '.join(found)}" for name, found in axes)


def score(options: ScoreOptions, console: Console = SILENT) -> Scored:
    """The scores of a model's units, added to those that ``save`` holds.

    Raises:
        ConfigError: options that do not go together, or a file of another model or other data.
        ShapeError: a layout that does not fit the model.
    """
    from megatron_prune.engine.groups import data_parallel_size, model_parallel, world_size

    grid, criteria = options.grid, _criteria(options.criterion)
    data_parallel_size(grid, world_size())
    options.check_data(criteria)
    inputs = (options.load, options.data, options.tokenizer_model)
    check_output_file(options.save, overwrite=True, inputs=inputs)  # scores are added to
    from megatron_prune.engine.forward.model import check_model

    with opened(options.load, options.family) as source:
        source.config.shape.check_uniform("score", "score its source")
        how = options.score_options(criteria, source.config, console)
        grid.check(source.config.shape)
        check_model(source.config, how.model, grid.tensor_parallel)
        how.removed_layers(source.config.shape.num_layers)
        timeout = options.distributed_timeout_minutes
        with model_parallel(grid, timeout_minutes=timeout) as groups:
            agree_on_start(groups.ranks, options, source)
            scores = _score(options, source, how, groups, console)
    tokens = scores.provenance.get("tokens", 0)
    console.say(f"{options.save}: {tokens} calibration tokens")
    return Scored(scores=scores)


def _score(
    options: ScoreOptions, source: Source, how: How, groups: Groups, console: Console
) -> Scores:
    from megatron_prune.engine.failures import on_first_rank
    from megatron_prune.engine.observe.score import score
    from megatron_prune.files import replace_file

    windows, known = on_first_rank(groups.ranks, lambda: _prepare(options, source, how, console))

    def save(scores: Scores) -> None:
        replace_file(options.save, scores_bytes(scores))

    return score(source, how, groups, windows, known=known, save=save)


def _prepare(
    options: ScoreOptions, source: Source, how: How, console: Console
) -> tuple[Tensor | None, Scores | None]:
    """The calibration windows, and what an earlier run found: of this model and these windows."""

    windows = options.samples(source, how.model.seq_length, console)
    if not options.save.exists():
        return windows, None
    try:
        known = load_scores(options.save)
    except (PlanError, DamagedError) as error:  # whatever it is, it may be all there is of it
        raise type(error)(f"--save {error}; remove it, or choose another file") from None
    other = _difference(known, source.digest, windows, how)
    if other is None:
        return windows, known
    if options.overwrite:
        return windows, None
    raise ConfigError(
        f"--save {options.save}: holds scores of {other}; choose another file or use --overwrite"
    )


def _difference(known: Scores, digest: str, windows: Tensor | None, how: How) -> str | None:
    """What scores in the file are of and this run's are not; None when they go together."""
    from megatron_prune.engine.observe.score import data_digest

    if known.source_digest != digest:
        return "another model"
    facts = known.provenance
    if windows is None or not facts.get("tokens"):
        return None  # magnitude alone goes with any data
    if facts.get("data_digest") != data_digest(windows):
        return "other data"
    if facts.get("dtype") != how.model.dtype:
        return f"a model run in {facts.get('dtype')}, this run is {how.model.dtype}"
    wanted = how.removal_facts(len(windows), known.shape.num_layers)
    for fact, value in wanted.items():
        uses = ("perplexity-greedy",) if fact == "removal_layers" else _REMOVING
        if facts.get(fact) != value and any(name in known.criteria for name in uses):
            flag = fact.replace("_", "-")
            return f"--{flag} {facts.get(fact, 'unrecorded')}, this run's is {value}"
    return None


def _criteria(text: str) -> tuple[str, ...]:
    found = criteria_in(text)
    unknown = [name for name in found if name not in SCORED]
    if unknown or not found:
        raise ConfigError(
            f"--criterion {text}: {', '.join(unknown) or 'nothing'} is no criterion to score; "
            f"wanted some of {', '.join(SCORED)}"
        )
    return found
