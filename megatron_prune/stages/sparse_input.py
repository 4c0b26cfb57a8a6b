"""What becomes of a sparse model's zeros in a stage that makes other weights of it.

Its record, ``sparsity.json``, names matrices of the whole model, so it does not go along; the
stage says in one line which of the zeros do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from megatron_prune.errors import DamagedError
from megatron_prune.model.axes import axes_of, layer_name, names, split_layer, tensor_shape
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.sources.source import SPARSITY, Source
from megatron_prune.sources.sparsity_record import Sparsity, load_sparsity, parse_pattern
from megatron_prune.stages.console import Console

_TOLD = 4  # kinds of matrices that the line names


@dataclass(frozen=True, kw_only=True)
class Left:
    """What slicing leaves of a sparse model's zeros.

    Attributes:
        share: of zeros in the sliced matrices, when what is dropped has as many as what is kept.
        is_whole: the matrices that are kept are kept whole.
        patterned, broken: matrices that had a pattern, and those whose groups are cut apart.
    """

    share: float
    is_whole: bool
    patterned: tuple[str, ...]
    broken: tuple[str, ...]


def zeros_left(record: Sparsity, plan: PrunePlan) -> Left:
    """What a plan leaves of a model's zeros, by its indices alone; no weight is read.

    A pattern is one of consecutive inputs. It survives where the kept inputs are whole groups: all
    of them, or heads of a multiple of M channels.
    """

    @cache
    def keeps_groups(axis: str, layer: int | None, group: int) -> bool:
        rows = plan.source.rows(axis)
        kept = [unit * rows + row for unit in plan.indices(axis, layer) for row in range(rows)]
        return len(kept) % group == 0 and all(
            kept[at] % group == 0 and kept[at + group - 1] == kept[at] + group - 1
            for at in range(0, len(kept), group)
        )

    zeros = size = 0.0
    is_whole, patterned, broken = True, [], []
    for new, old in enumerate(plan.layers):
        for name, matrix in record.tensors.items():
            layer, rest = split_layer(name)
            if layer != old:
                continue
            height, width = tensor_shape(layer_name(new, rest), plan.target)
            size, zeros = size + height * width, zeros + matrix.reached * height * width
            is_whole = is_whole and (height, width) == tensor_shape(name, plan.source)
            if matrix.pattern is not None:
                patterned.append(name)
                group = parse_pattern(matrix.pattern).group
                if not keeps_groups(axes_of(name)[1], old, group):
                    broken.append(name)
    return Left(
        share=zeros / size if size else 0.0,
        is_whole=is_whole,
        patterned=tuple(patterned),
        broken=tuple(broken),
    )


def tell_zeros_left(
    source: Source, plan: PrunePlan, console: Console, *, is_refitted: bool
) -> None:
    """Say what pruning leaves of a sparse model's zeros and of its pattern; nothing of a dense one.

    Args:
        is_refitted: a repair computes matrices anew.
    """
    record = _record(source, console)
    if record is None:
        return
    left = zeros_left(record, plan)
    said = f"{source.path}: is sparse ({record.words}); "
    if left.is_whole:
        said += "the zeros of what is kept stay as they are"
        said += ", and so does the pattern" if left.patterned else ""
    else:
        said += f"about {left.share:.1%} of zeros are expected to stay in its matrices"
        said += _pattern_words(left)
    if is_refitted:
        said += "; matrices that --repair computes anew have no zeros"
    console.say(
        f"{said}. {SPARSITY} speaks of the whole model and stays behind; train --keep-zeros keeps "
        "what is zero"
    )


def _pattern_words(left: Left) -> str:
    if not left.patterned:
        return ""
    if not left.broken:
        return ", and the pattern holds, since whole groups of inputs are kept"
    kinds = list(dict.fromkeys(split_layer(name)[1] for name in left.broken))
    named = ", ".join(kind.removesuffix(".weight") for kind in kinds[:_TOLD])
    more = f" and {len(kinds) - _TOLD} more" if len(kinds) > _TOLD else ""
    return (
        f", but the pattern does not survive dropped input channels: it is lost in "
        f"{len(left.broken)} of {len(left.patterned)} matrices ({named}{more}); sparsify what is "
        "written to have it again"
    )


def tell_zeros_gone(source: Source, console: Console) -> None:
    """Say that a sparse model is dense in another basis; nothing of a dense one."""
    record = _record(source, console)
    if record is not None:
        console.say(
            f"{source.path}: is sparse ({record.words}); the rotation mixes its hidden channels, "
            f"so the zeros are gone and {SPARSITY} stays behind; rotate the dense model, then "
            "sparsify"
        )


def _record(source: Source, console: Console) -> Sparsity | None:
    if source.sparsity_path is None:
        return None
    try:
        record = load_sparsity(source.sparsity_path)
    except DamagedError as error:
        console.say(f"warning: {error}; what becomes of its zeros is not known")
        return None
    known = {name for name in names(source.config) if len(axes_of(name)) == 2}
    tensors = {name: matrix for name, matrix in record.tensors.items() if name in known}
    return replace(record, tensors=tensors)
