"""One page that shows scores, plans, searches, zeros, training runs and judged models, by itself.

  megatron-prune report scores.safetensors plan.json --save report.html
  megatron-prune report pruned=/ckpt/recovered random=/ckpt/random dense=dense.json \\
      pruned.json plan.json --load llama --save report.html --png-dir figures --csv-dir numbers

Files are recognised by what they hold, in any order: at most one of scores, any number of plans,
candidates, runs of train or shear (their directories), results of evaluate, and sparse models
(their directories, or sparsity.json). NAME=PATH gives one another name. The page opens in any
browser, light or dark, offline, and prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.errors import PlanError
from megatron_prune.families import FAMILIES
from megatron_prune.files import replace_file
from megatron_prune.flags import flag
from megatron_prune.model.shape import ModelConfig
from megatron_prune.report.inputs import Inputs, read_inputs, split_name
from megatron_prune.report.page import (
    beside_files,
    check_directory,
    page_html,
    with_unique_names,
    write_beside,
)
from megatron_prune.report.sections import report_sections
from megatron_prune.stages.common import check_not_input, check_output_file, opened
from megatron_prune.stages.console import SILENT, Console


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    inputs: tuple[str, ...] = flag(
        "scores, plan, candidates of a budget search, a run, a result of evaluate, a sparse model",
        metavar="[NAME=]PATH",
        positional=True,
    )
    save: Path = flag("the page", metavar="HTML")
    png_dir: Path | None = flag(
        "also write every picture as PNG, data as CSV", default=None, metavar="DIR"
    )
    csv_dir: Path | None = flag(
        "the data as CSV here, not beside the PNGs", default=None, metavar="DIR"
    )
    overwrite: bool = flag("replace what is there", default=False)
    load: Path | None = flag(
        "the source model, for exact parameters and bytes", default=None, metavar="SRC"
    )
    family: str | None = flag(
        "of a stock Megatron checkpoint in --load", default=None, choices=tuple(FAMILIES)
    )


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A page that was written.

    Attributes:
        beside: directories, and how many files were written into each.
    """

    path: Path
    bytes: int
    beside: tuple[tuple[Path, int], ...]

    def __str__(self) -> str:
        lines = [f"wrote {count} files into {folder}" for folder, count in self.beside]
        return "\n".join([*lines, f"wrote {self.path}: {self.bytes / 1e6:.2f} MB"])


def report(options: ReportOptions, console: Console = SILENT) -> Reported:
    """Write the page, and what is asked for beside it.

    Raises:
        ConfigError: an output that is there or is an input; inputs that are none.
        PlanError: ``load`` is another model than the one the inputs are about.
    """
    names, paths = zip(*map(split_name, options.inputs))
    _check_outputs(options, paths)
    inputs = read_inputs(paths, names)
    sections = with_unique_names(report_sections(inputs, _model(options, inputs, console)))
    is_pruned = inputs.source is not None or inputs.searches or inputs.sparse
    title = "Pruning report" if is_pruned else "Training report"
    page = page_html(title, ", ".join(file.label for file in inputs.files), sections).encode()
    files = beside_files(sections)
    numbers = [name for name in files if name.endswith(".csv")]
    pictures = [name for name in files if name not in numbers]
    where = {"--png-dir": (options.png_dir, pictures), "--csv-dir": (options.csv_dir, numbers)}
    if options.csv_dir is None:
        where = {"--png-dir": (options.png_dir, [*files])}
    beside = []
    for name, (directory, wanted) in where.items():
        if directory is not None:
            chosen = {file: files[file] for file in wanted}
            write_beside(directory, chosen, flag=name, overwrite=options.overwrite)
            beside.append((directory, len(chosen)))
    replace_file(options.save, page)
    return Reported(path=options.save, bytes=len(page), beside=tuple(beside))


def _check_outputs(options: ReportOptions, paths: Sequence[Path]) -> None:
    inputs = (*(path for path in paths if path.is_file()), options.load)
    check_output_file(options.save, overwrite=options.overwrite, inputs=inputs)
    for name, directory in (("--png-dir", options.png_dir), ("--csv-dir", options.csv_dir)):
        if directory is not None:
            check_not_input(name, directory, inputs)
            check_directory(directory, name)


def _model(options: ReportOptions, inputs: Inputs, console: Console) -> ModelConfig | None:
    """The configuration of ``--load``, which has to be the model that the inputs are about."""
    if options.load is None:
        return None
    with opened(options.load, options.family) as source:
        found, wanted = source.digest, inputs.source_digest
        if wanted is not None and found != wanted:
            raise PlanError(
                f"--load {options.load}: is model {found[:16]}, the inputs are about model "
                f"{wanted[:16]} (source_digest); give the model they were made from"
            )
        return source.config
