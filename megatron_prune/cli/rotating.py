"""``convert --rotate``: the same model in the principal components of its hidden state."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from megatron_prune.cli import options
from megatron_prune.cli.calibration import (
    add_calibration_arguments,
    calibration_grid,
    calibration_windows,
    longest_window,
)
from megatron_prune.cli.engine_flags import process_groups
from megatron_prune.errors import ConfigError
from megatron_prune.model.axes import count_parameters
from megatron_prune.ranks import Ranks
from megatron_prune.sources.rotated import RotatedSource, principal_components
from megatron_prune.sources.source import Source

if TYPE_CHECKING:
    from torch import Tensor


def add_rotation_arguments(parser: argparse.ArgumentParser) -> None:
    """``--rotate`` and its calibration."""
    group = parser.add_argument_group("rotation (alone, or under torchrun)")
    group.add_argument(
        "--rotate",
        action="store_true",
        help="turn the hidden state into its principal components: the same function, but hidden "
        "channels can be pruned at less loss. Unties the embeddings",
    )
    add_calibration_arguments(group)


def check_rotation(args: argparse.Namespace) -> bool:
    """Whether a rotation is asked for; refuses flags that do not go together.

    Raises:
        ConfigError: see the messages.
    """
    if not args.rotate:
        if args.data is not None:
            raise ConfigError("--data without --rotate: nothing would use it")
        return False
    if args.data is None:
        raise ConfigError("--rotate without --data: it needs text to calibrate on")
    for path in (args.data, args.tokenizer_model):
        if path is not None and not path.exists():
            raise ConfigError(f"{path}: is not there")
    return True


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
def rotated(args: argparse.Namespace, source: Source) -> Iterator[Rotated]:
    """The model in its principal components; process groups live for the block.

    Costs one forward pass layer by layer and one eigendecomposition ``[D, D]`` in float64 on the
    first rank.

    Raises:
        ConfigError: data, tokenizer or options that do not fit.
    """
    import torch.distributed as dist

    from megatron_prune.engine.failures import on_first_rank, together
    from megatron_prune.engine.forward.model import ModelOptions, check_model
    from megatron_prune.engine.observe.layerwise import norm_moment

    grid = calibration_grid(None, args, source)
    model = ModelOptions(
        seq_length=args.seq_length or longest_window(source), dtype="bf16" if args.bf16 else "fp32"
    )
    grid.check(source.config.shape)
    check_model(source.config, model, grid.tensor_parallel)
    with process_groups(args, grid) as groups:
        options.agree_on_arguments(groups.ranks, args)
        windows = on_first_rank(
            groups.ranks, lambda: calibration_windows(args, source, model.seq_length)
        )
        quiet, layers = not groups.ranks.is_first, source.config.shape.num_layers
        with tqdm(total=layers, desc="rotate", unit="layer", disable=quiet, file=sys.stderr) as bar:
            moment = norm_moment(source, windows, groups, model, bar.update)
        basis = moment.to(groups.device)
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
        _tell(source, turned, basis.T @ moment.to(basis.device) @ basis)
        yield Rotated(source=turned, ranks=groups.ranks)


def _tell(source: Source, turned: Source, moment_DD: Tensor) -> None:
    energy = moment_DD.diagonal().cumsum(0) / moment_DD.trace()
    size = len(energy)
    shares = ", ".join(
        f"{n} hold {100 * float(energy[n - 1]):.1f}%" for n in (size // 2, 2 * size // 3) if n
    )
    options.show(f"of {size} components of the normalised residual stream {shares} of its energy")
    if source.config.tied:
        before, after = count_parameters(source.config), count_parameters(turned.config)
        options.say(f"the embeddings are no longer tied: {before:,} parameters become {after:,}")
