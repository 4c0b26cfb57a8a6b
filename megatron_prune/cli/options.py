"""Flags that several stages share, and what they become."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from megatron_prune import __version__
from megatron_prune.errors import ConfigError, StorageError
from megatron_prune.families import FAMILIES
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.shape import ModelShape
from megatron_prune.ranks import Ranks, is_first_rank
from megatron_prune.sources.source import DTYPES, CastSource, Source
from megatron_prune.store import open_source
from megatron_prune.store.commit import check_target
from megatron_prune.surgery import Target

FORMATS = ("torch_dist", "torch")


def positive(text: str) -> int:
    """An integer of 1 or more, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted an integer of 1 or more")
    return value


def add_load(parser: argparse.ArgumentParser) -> None:
    """``--load`` and ``--family``."""
    parser.add_argument(
        "--load", type=Path, required=True, metavar="SRC", help="checkpoint; format is detected"
    )
    parser.add_argument(
        "--family",
        choices=FAMILIES,
        help="of a stock Megatron checkpoint whose arguments do not tell",
    )


def add_save(parser: argparse.ArgumentParser) -> None:
    """``--save``, ``--overwrite`` and ``--dry-run``."""
    parser.add_argument("--save", type=Path, required=True, metavar="DST", help="new directory")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace DST once the new one is complete"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and print, write nothing")


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Megatron's flags for a tensor- and pipeline-parallel layout."""
    group = parser.add_argument_group("layout")
    for flag, metavar, default, what in (
        ("tensor-model-parallel-size", "N", 1, "ranks that share each layer (default: 1)"),
        ("pipeline-model-parallel-size", "M", 1, "stages that share the layers (default: 1)"),
        ("decoder-first-pipeline-num-layers", "L", None, "of the first stage (default: even)"),
        ("decoder-last-pipeline-num-layers", "L", None, "of the last stage (default: even)"),
    ):
        group.add_argument(f"--{flag}", type=positive, default=default, metavar=metavar, help=what)


def add_target(parser: argparse.ArgumentParser) -> None:
    """``--to`` and what belongs to either format."""
    parser.add_argument("--to", choices=("hf", "megatron"), required=True, help="target format")
    add_megatron_format(parser, default="torch_dist")
    add_layout(parser)
    parser.add_argument(
        "--dtype", choices=("keep", *DTYPES), default="keep", help="of the weights (default: keep)"
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of a safetensors file, such as 5GB or 500MB (default: 5GB)",
    )


def add_megatron_format(parser: argparse.ArgumentParser, default: str | None) -> None:
    """``--ckpt-format`` and the layer spec whose names the legacy format uses."""
    parser.add_argument(
        "--ckpt-format",
        choices=FORMATS,
        default=default,
        help="Megatron's formats: distributed or legacy"
        + (f" (default: {default})" if default else " (default: the source's)"),
    )
    parser.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="layer spec that a legacy checkpoint names its norms for",
    )


def grid_from(args: argparse.Namespace) -> ParallelGrid:
    """The layout that the flags of `add_layout` name."""
    return ParallelGrid(
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        first_stage_layers=args.decoder_first_pipeline_num_layers,
        last_stage_layers=args.decoder_last_pipeline_num_layers,
    )


def target_from(args: argparse.Namespace) -> Target:
    """The target that the flags of `add_target` name."""
    if args.to == "hf" and (grid := grid_from(args)) != ParallelGrid():
        raise ConfigError(
            f"--to hf with {grid.tensor_parallel} x {grid.pipeline_parallel} parallel shards: a "
            "Hugging Face directory is not split by rank; leave the sizes out"
        )
    return Target(
        directory=args.save,
        format="hf" if args.to == "hf" else args.ckpt_format,
        grid=grid_from(args),
        max_shard_bytes=parse_bytes(args.max_shard_size),
        base_model=args.base_model,
        te_norms=args.transformer_impl == "transformer_engine",
    )


def parse_bytes(text: str) -> int:
    """``5GB`` -> 5 * 10**9, as transformers counts.

    Raises:
        ConfigError: not a size.
    """
    word = text.strip().upper()
    for suffix, factor in (
        ("GIB", 2**30),
        ("MIB", 2**20),
        ("GB", 10**9),
        ("MB", 10**6),
        ("KB", 10**3),
    ):
        if word.endswith(suffix) and word.removesuffix(suffix).strip().isdigit():
            return int(word.removesuffix(suffix)) * factor
    raise ConfigError(f"--max-shard-size {text!r}: wanted a size such as 5GB or 500MB")


@contextmanager
def opened(path: Path, family: str | None) -> Iterator[Source]:
    """The source at ``path``, closed at the end."""
    with messages():
        source = open_source(path, family=family)
    try:
        yield source
    finally:
        source.close()


def cast(source: Source, dtype: str) -> Source:
    """The source in the dtype of ``--dtype``."""
    return source if dtype == "keep" else CastSource(source, dtype)


def check_save(args: argparse.Namespace) -> None:
    """Refuse the output, or an output that is the input, before anything is opened."""
    target, source = args.save.resolve(), args.load.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise ConfigError(
            f"--save {args.save}: is or holds --load {args.load}; inputs never change"
        )
    check_target(args.save, overwrite=args.overwrite)


def check_output_file(
    path: Path, *, overwrite: bool, inputs: Iterable[Path | None], flag: str = "--save"
) -> None:
    """Refuse a file that is to be written, before anything is opened.

    Args:
        inputs: what the command reads; None stands for nothing.

    Raises:
        ConfigError: a directory, there already, or an input or inside of one.
        StorageError: its place is missing.
    """
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a directory; wanted a file")
    check_not_input(flag, path, inputs)
    if path.exists() and not overwrite:
        raise ConfigError(f"{flag} {path}: exists; remove it or use --overwrite")
    if not path.absolute().parent.is_dir():
        raise StorageError(f"{flag} {path}: {path.parent} does not exist; make it first")


def check_not_input(flag: str, path: Path, inputs: Iterable[Path | None]) -> None:
    """Refuse an output that is one of the inputs, or inside of one.

    Raises:
        ConfigError: it is.
    """
    for given in inputs:
        if given is not None and path.resolve().is_relative_to(given.resolve()):
            raise ConfigError(
                f"{flag} {path}: is or lies in {given}, one of the inputs; they never change, "
                "choose another place"
            )


def balance_for(args: argparse.Namespace, source: Source) -> int:
    """``--balance-for``, by default the source's tensor-parallel size."""
    size: int | None = args.balance_for
    return source.grid.tensor_parallel if size is None else size


def agree_on_arguments(ranks: Ranks, args: argparse.Namespace) -> None:
    """Refuse ranks that were started with different arguments, or from different versions."""
    ranks.agree("the version of megatron_prune", __version__)
    ranks.agree("the command line", repr(sorted(vars(args).items())))


@contextmanager
def messages() -> Iterator[None]:
    """Warnings of the block as one line each on standard error, from rank 0."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught if is_first_rank() else ():
        say(f"warning: {warning.message}")


def say(message: str) -> None:
    """A message to the user: standard error, rank 0 only."""
    if is_first_rank():
        print(f"megatron-prune: {message}", file=sys.stderr)


def show(text: str) -> None:
    """A result: standard output, rank 0 only."""
    if is_first_rank():
        print(text, flush=True)


@contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int], Callable[[int], object]]]:
    """A progress bar over bytes with rate and time left, on rank 0; ended whatever happens."""
    with ExitStack() as bars:

        def start(total: int) -> Callable[[int], object]:
            bar = tqdm(
                total=total,
                desc=what,
                unit="B",
                unit_scale=True,
                disable=not is_first_rank(),
                mininterval=0.5,
            )
            return bars.enter_context(bar).update

        yield start


def shape_table(source: ModelShape, target: ModelShape | None = None) -> str:
    """Sizes under Megatron's names, one per line; two columns with a target."""
    rows, last = [], target or source
    for name, size in source.as_dict().items():
        if isinstance(size, int):
            after = "" if target is None else f"{target.as_dict()[name]:>10}"
            rows.append(f"{name:<22}{size:>10}{after}")
    if last.ffn_per_layer is not None:  # ffn_hidden_size is then the widest
        rows.append(f"{'ffn_per_layer':<22}{' '.join(map(str, last.ffn_per_layer))}")
    return "\n".join(rows)
