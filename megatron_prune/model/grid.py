"""Which rank holds what: plain arithmetic on sizes, no process groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_prune.errors import ShapeError
from megatron_prune.flags import Group, flag, positive
from megatron_prune.model.shape import ModelShape

VOCAB_DIVISOR = 128  # Megatron's --make-vocab-size-divisible-by
LAYOUT = Group("layout", is_last=True)


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Megatron's padded vocabulary: the next multiple of ``128 * TP``."""
    multiple = VOCAB_DIVISOR * tensor_parallel
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class ParallelGrid:
    """A tensor- and pipeline-parallel layout and the layers of each stage.

    ``layers_per_stage`` follows Megatron: even, or with ``--decoder-first-pipeline-num-layers`` and
    ``--decoder-last-pipeline-num-layers`` the stages in between share the rest evenly.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def ranks(self) -> Iterator[tuple[int, int]]:
        """``(tp_rank, pp_rank)`` of every model-parallel rank, in Megatron's order."""
        for pp_rank in range(self.pipeline_parallel):
            for tp_rank in range(self.tensor_parallel):
                yield tp_rank, pp_rank

    def check(self, shape: ModelShape) -> None:
        """Refuse a layout this shape does not divide into.

        Raises:
            ShapeError: with the legal sizes.
        """
        shape.check_tensor_parallel(self.tensor_parallel)
        if self.pipeline_parallel < 1:
            raise ShapeError(
                f"pipeline-model-parallel-size is {self.pipeline_parallel}; wanted 1 or more"
            )
        self.layers_per_stage(shape.num_layers)

    def layers_per_stage(self, num_layers: int) -> list[int]:
        """Layers of each pipeline stage, in order.

        Raises:
            ShapeError: the layers do not divide by the stages.
        """
        fixed = [n for n in (self.first_stage_layers, self.last_stage_layers) if n is not None]
        middle, rest = self.pipeline_parallel - len(fixed), num_layers - sum(fixed)
        if any(n < 1 for n in fixed) or middle < 0 or rest < middle or (middle == 0 and rest):
            raise ShapeError(
                f"{num_layers} layers over {self.pipeline_parallel} pipeline stages with "
                f"first {self.first_stage_layers} and last {self.last_stage_layers} does not add up"
            )
        if middle and rest % middle:
            legal = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
            raise ShapeError(
                f"{num_layers} layers do not divide over pipeline-model-parallel-size "
                f"{self.pipeline_parallel}; legal sizes: {', '.join(map(str, legal))}, or set "
                "--decoder-first-pipeline-num-layers / --decoder-last-pipeline-num-layers"
            )
        stages = [rest // middle] * middle if middle else []
        if self.first_stage_layers is not None:
            stages = [self.first_stage_layers, *stages]
        if self.last_stage_layers is not None:
            stages = [*stages, self.last_stage_layers]
        return stages

    def for_layers(self, num_layers: int) -> ParallelGrid:
        """This grid with stages for any number of layers, at least one each: as even as the first
        and last stage can make them, which alone may differ."""
        even = replace(self, first_stage_layers=None, last_stage_layers=None)
        stages = self.pipeline_parallel
        if num_layers % stages == 0 or num_layers < stages:
            return even  # too few are refused by `check`
        if stages == 2:
            return replace(even, first_stage_layers=-(-num_layers // 2))
        below = num_layers // stages
        middle = min(
            (n for n in (below, below + 1) if num_layers - n * (stages - 2) >= 2),
            key=lambda n: max(n, -(-(num_layers - n * (stages - 2)) // 2)),
        )
        ends = num_layers - middle * (stages - 2)
        return replace(even, first_stage_layers=-(-ends // 2), last_stage_layers=ends // 2)

    def stage_layers(self, num_layers: int, pp_rank: int) -> range:
        """The layers of one stage, in the model's numbering."""
        sizes = self.layers_per_stage(num_layers)
        start = sum(sizes[:pp_rank])
        return range(start, start + sizes[pp_rank])


def part_range(size: int, part: int, parts: int) -> tuple[int, int]:
    """``[start, stop)`` of an evenly split axis."""
    return size * part // parts, size * (part + 1) // parts


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Megatron's flags for a tensor- and pipeline-parallel layout."""

    tensor_model_parallel_size: int = flag(
        "ranks that share each layer", default=1, parse=positive, metavar="N", group=LAYOUT
    )
    pipeline_model_parallel_size: int = flag(
        "stages that share the layers", default=1, parse=positive, metavar="M", group=LAYOUT
    )
    decoder_first_pipeline_num_layers: int | None = flag(
        "of the first stage (default: even)",
        default=None,
        parse=positive,
        metavar="L",
        group=LAYOUT,
    )
    decoder_last_pipeline_num_layers: int | None = flag(
        "of the last stage (default: even)", default=None, parse=positive, metavar="L", group=LAYOUT
    )

    @property
    def grid(self) -> ParallelGrid:
        return ParallelGrid(
            tensor_parallel=self.tensor_model_parallel_size,
            pipeline_parallel=self.pipeline_model_parallel_size,
            first_stage_layers=self.decoder_first_pipeline_num_layers,
            last_stage_layers=self.decoder_last_pipeline_num_layers,
        )
