"""Text that is run through a model before anything is decided or written, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.engine.running import CALIBRATION
from megatron_prune.errors import ConfigError
from megatron_prune.flags import flag, minutes, positive
from megatron_prune.model.grid import Layout, ParallelGrid
from megatron_prune.model.lazy import Tensor
from megatron_prune.model.shape import ModelConfig
from megatron_prune.sources.source import Source
from megatron_prune.stages.common import Loads
from megatron_prune.stages.console import Console

if TYPE_CHECKING:
    from megatron_prune.engine.forward.model import ModelOptions

_LONGEST = 1024  # tokens of a window, unless a flag says more


@dataclass(frozen=True, kw_only=True)
class Calibration(Layout, Loads):
    """Of a stage that runs a model on text of the user's."""

    data: Path | None = flag(
        "text, or JSON lines with 'text'", default=None, metavar="CALIB", group=CALIBRATION
    )
    num_samples: int = flag(
        "windows of CALIB at most",
        default=128,
        parse=positive,
        metavar="N",
        group=CALIBRATION,
        also=("--nsamples",),
    )
    seq_length: int | None = flag(
        f"tokens of a window (default: {_LONGEST}, or what the model takes)",
        default=None,
        parse=positive,
        metavar="N",
        group=CALIBRATION,
    )
    tokenizer_model: Path | None = flag(
        "of CALIB (default: the checkpoint's own)", default=None, metavar="PATH", group=CALIBRATION
    )

    def check_files(self) -> None:
        """Refuse text or a tokenizer that is not there.

        Raises:
            ConfigError: it is not.
        """
        for path in (self.data, self.tokenizer_model):
            if path is not None and not path.exists():
                raise ConfigError(f"{path}: is not there")

    def windows(self, source: Source, seq_length: int, console: Console) -> Tensor:
        """[W, S] int64 token ids of ``--data``."""
        from megatron_prune.data.windows import model_windows

        assert self.data is not None
        windows, _ = model_windows(
            self.data,
            self.tokenizer_model or self.load,
            seq_length=seq_length,
            max_windows=self.num_samples,
            vocab_size=source.config.shape.vocab_size,
        )
        if len(windows) < self.num_samples:
            console.say(f"{self.data}: {len(windows)} windows, fewer than --num-samples")
        return windows


@dataclass(frozen=True, kw_only=True)
class LayerwiseCalibration(Calibration):
    """Of a stage that runs one layer after the other on the way to a checkpoint."""

    bf16: bool = flag("calibrate in bfloat16 (default: fp32)", default=False, group=CALIBRATION)
    distributed_timeout_minutes: float = flag(
        "give up on a silent rank after this long",
        default=30,
        parse=minutes,
        metavar="M",
        group=CALIBRATION,
    )

    def calibration_run(
        self, source: Source, tensor_parallel: int | None = None
    ) -> tuple[ModelOptions, ParallelGrid]:
        """How the model is run: one layer in memory, tensor parallel, the rest data parallel.

        Args:
            tensor_parallel: None for the target's where it divides ranks and source, else 1.

        Raises:
            ConfigError, ShapeError: the model cannot be run so.
        """
        from megatron_prune.engine.forward.model import ModelOptions, check_model
        from megatron_prune.engine.groups import world_size

        if tensor_parallel is None:
            tensor_parallel = self.tensor_model_parallel_size
            legal = source.config.shape.legal_tensor_parallel_sizes()
            if world_size() % tensor_parallel or tensor_parallel not in legal:
                tensor_parallel = 1
        grid = ParallelGrid(tensor_parallel=tensor_parallel)
        model = ModelOptions(
            seq_length=self.seq_length or longest_window(source.config, _LONGEST),
            dtype="bf16" if self.bf16 else "fp32",
        )
        grid.check(source.config.shape)
        check_model(source.config, model, grid.tensor_parallel)
        return model, grid


def longest_window(config: ModelConfig, limit: int) -> int:
    """``limit`` tokens, or as many as the model takes."""
    return min(limit, config.max_position_embeddings, config.sliding_window or limit)
