"""The text that scores come from, of `score` and of `plan --rounds`, and how it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_prune.criteria import SCORED
from megatron_prune.engine.running import CALIBRATION, Engine, ScoreRuns
from megatron_prune.errors import ConfigError
from megatron_prune.flags import flag, positive
from megatron_prune.model.lazy import Tensor
from megatron_prune.stages.calibration import Calibration, longest_window
from megatron_prune.stages.console import Console

if TYPE_CHECKING:
    from megatron_prune.engine.observe.score import ScoreOptions
    from megatron_prune.model.shape import ModelConfig
    from megatron_prune.sources.source import Source

_LONGEST = 4096  # tokens of a sample, unless a flag says more


@dataclass(frozen=True, kw_only=True)
class Scoring(ScoreRuns, Calibration, Engine):
    """Of a stage that scores."""

    num_samples: int = flag("at most", default=1024, parse=positive, metavar="N", group=CALIBRATION)
    seq_length: int | None = flag(
        f"of a sample (default: {_LONGEST}, or what the model takes)",
        default=None,
        parse=positive,
        metavar="N",
        group=CALIBRATION,
    )

    def check_data(self, criteria: Sequence[str]) -> None:
        """Refuse criteria that look at text when there is none, before the source is opened.

        Raises:
            ConfigError: there is none, or a file is not there.
        """
        text = [name for name in criteria if SCORED[name].is_observed]
        if text and self.data is None:
            raise ConfigError(
                f"--data is missing: {', '.join(text)} look at the model at work on text"
            )
        self.check_files()

    def score_options(
        self, criteria: Sequence[str], config: ModelConfig, console: Console
    ) -> ScoreOptions:
        """How to score a model, as the flags say."""
        from megatron_prune.engine.forward.model import ModelOptions
        from megatron_prune.engine.observe.score import ScoreOptions

        length = self.seq_length
        if length is None:
            length = longest_window(config, _LONGEST)
            if length < _LONGEST and self.data is not None:
                console.say(f"--seq-length {length}: as much as the model takes")
        return ScoreOptions(
            criteria=tuple(criteria),
            model=ModelOptions.of(self, length),
            micro_batch_size=self.micro_batch_size,
            removal_samples=self.removal_samples,
            removal_layers=self.removal_layers,
        )

    def samples(self, source: Source, seq_length: int, console: Console) -> Tensor | None:
        """[W, S] int64 tokens of ``--data``; None without."""
        return None if self.data is None else self.windows(source, seq_length, console)
