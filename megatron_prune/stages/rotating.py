"""``convert --rotate``: the same model in the principal components of its hidden state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_prune.errors import ConfigError
from megatron_prune.flags import Group, flag
from megatron_prune.model.axes import count_parameters
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.ranks import Ranks
from megatron_prune.sources.rotated import RotatedSource, principal_components
from megatron_prune.sources.source import Source
from megatron_prune.stages.calibration import LayerwiseCalibration
from megatron_prune.stages.common import agree_on_start
from megatron_prune.stages.console import Console

ROTATION = Group("rotation (alone, or under torchrun)")


@dataclass(frozen=True, kw_only=True)
class Rotation(LayerwiseCalibration):
    """Of a stage that can rotate what it reads."""

    rotate: bool = flag(
        "turn the hidden state into its principal components: the same function, but hidden "
        "channels can be pruned at less loss. Unties the embeddings",
        default=False,
        group=ROTATION,
    )

    def check_rotation(self) -> None:
        """Refuse flags that do not go together.

        Raises:
            ConfigError: see the messages.
        """
        if not self.rotate:
            if self.data is not None:
                raise ConfigError("--data without --rotate: nothing would use it")
            return
        if self.data is None:
            raise ConfigError("--rotate without --data: it needs text to calibrate on")
        self.check_files()


def unrotated(source: Source) -> Source:
    """What `rotated` gives, but in its old basis: has its shapes, and knows no text."""
    import torch

    return RotatedSource(source, torch.eye(source.config.shape.hidden_size), {})


@dataclass(frozen=True, kw_only=True)
class Rotated:
    """A rotated model, and the ranks that agree on it."""

    source: Source
    ranks: Ranks


@contextmanager
def rotated(options: Rotation, source: Source, console: Console) -> Iterator[Rotated]:
    """The model in its principal components; process groups live for the block.

    Costs one forward pass layer by layer and one eigendecomposition ``[D, D]`` in float64 on the
    first rank.

    Raises:
        ConfigError: data, tokenizer or options that do not fit.
    """
    import torch.distributed as dist

    from megatron_prune.engine.failures import on_first_rank, together
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.engine.observe.layerwise import norm_moment

    model, grid = options.calibration_run(source)
    timeout = options.distributed_timeout_minutes
    with model_parallel(grid, timeout_minutes=timeout) as groups:
        agree_on_start(groups.ranks, options, source)
        windows = on_first_rank(
            groups.ranks, lambda: options.windows(source, model.seq_length, console)
        )
        with console.bar("rotate", unit="layer") as bar:
            progress = bar(source.config.shape.num_layers)
            moment = norm_moment(source, windows, groups, model, progress)
        basis = torch.empty_like(moment, device=groups.device)
        together(
            groups.ranks,
            lambda: basis.copy_(principal_components(moment)) if groups.ranks.is_first else basis,
        )
        dist.broadcast(basis, 0)
        record = {
            "source_digest": source.digest,
            "data_digest": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            "tokens": windows.numel(),
            "dtype": model.dtype,
        }
        turned = RotatedSource(source, basis.cpu(), record)
        _tell(source, turned, basis.T @ moment.to(basis.device) @ basis, console)
        yield Rotated(source=turned, ranks=groups.ranks)


def _tell(source: Source, turned: Source, moment_DD: Tensor, console: Console) -> None:
    energy = moment_DD.diagonal().cumsum(0) / moment_DD.trace()
    size = len(energy)
    shares = ", ".join(
        f"{n} hold {100 * float(energy[n - 1]):.1f}%" for n in (size // 2, 2 * size // 3) if n
    )
    console.show(f"of {size} components of the normalised residual stream {shares} of its energy")
    if source.config.tied:
        before, after = count_parameters(source.config), count_parameters(turned.config)
        console.say(f"the embeddings are no longer tied: {before:,} parameters become {after:,}")
