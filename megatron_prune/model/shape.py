"""What a model is, apart from its weights: named axes, their sizes (`ModelShape`) and the rest.

Nothing here knows a file format or a tensor; `blocks` knows the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import gcd
from typing import Any

from megatron_prune.errors import ShapeError
from megatron_prune.model.family import Family


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A named axis of the model.

    Attributes:
        size: the field of `ModelShape` that counts its indices.
        word: what plan files call it; ``unit`` is what one index is called in messages.
        is_per_layer: every layer keeps indices of its own.
        is_split: tensor parallelism splits it over ranks; others are replicated, and ``L`` is split
            over pipeline stages.
        has_channels: an index owns ``kv_channels`` rows of a tensor, else one.
        is_scored: criteria score its units.
    """

    size: str
    word: str
    unit: str
    is_per_layer: bool = False
    is_split: bool = False
    has_channels: bool = False
    is_scored: bool = True


AXES = {
    "V": Axis(size="vocab_size", word="vocab", unit="token", is_split=True, is_scored=False),
    "D": Axis(size="hidden_size", word="hidden", unit="hidden channel"),
    "Q": Axis(
        size="num_attention_heads", word="heads", unit="attention head",
        is_per_layer=True, is_split=True, has_channels=True,
    ),
    "K": Axis(
        size="num_query_groups", word="query_groups", unit="query group",
        is_per_layer=True, is_split=True, has_channels=True,
    ),
    "F": Axis(
        size="ffn_hidden_size", word="ffn", unit="FFN channel", is_per_layer=True, is_split=True
    ),
    "L": Axis(size="num_layers", word="layers", unit="layer"),
    "C": Axis(size="kv_channels", word="kv_channels", unit="channel of a head", is_scored=False),
}  # fmt: skip
"""The axes by their letters: the only place that says what each is."""
SCORED_AXES = "".join(letter for letter, axis in AXES.items() if axis.is_scored)
LAYER_AXES = "".join(letter for letter, axis in AXES.items() if axis.is_per_layer)


_MOST_LAYERS, _MOST = 10_000, 1 << 27
"""Of layers, and of every other size: what is larger is no model, and whoever loops over it or asks
for the memory would not come back."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a LLaMA-like model, under Megatron's names.

    Attributes:
        ffn_per_layer: FFN channels of each layer where they differ, and ``ffn_hidden_size`` is then
            the widest; None where all layers have ``ffn_hidden_size``.

    Raises:
        ShapeError: a size is not a positive integer, or heads are not a multiple of groups;
            ``ffn_per_layer`` does not fit the rest, or is equal in all layers.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    ffn_per_layer: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sizes = asdict(self)
        widths = sizes.pop("ffn_per_layer")
        for name, size in (*sizes.items(), *(("ffn_per_layer", width) for width in widths or ())):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ShapeError(f"{name} is {size!r:.60}; wanted a positive integer")
            if size > (most := _MOST_LAYERS if name == "num_layers" else _MOST):
                raise ShapeError(f"{name} is more than {most}, than any model has")
        if self.num_attention_heads % self.num_query_groups:
            raise ShapeError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}: every group has equally many heads"
            )
        if widths is None:
            return
        if len(widths) != self.num_layers or len(set(widths)) == 1:
            raise ShapeError(
                f"ffn_per_layer {list(widths)}: wanted {self.num_layers} widths, one a layer, that "
                "are not all the same"
            )
        if max(widths) != self.ffn_hidden_size:
            raise ShapeError(
                f"ffn_hidden_size is {self.ffn_hidden_size}; wanted {max(widths)}, the widest of "
                "ffn_per_layer"
            )

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    @property
    def ffn_widths(self) -> tuple[int, ...]:
        """FFN channels of every layer."""
        return self.ffn_per_layer or (self.ffn_hidden_size,) * self.num_layers

    def size(self, axis: str, layer: int | None = None) -> int:
        """Indices along a named axis, of a layer where layers differ; without one the largest."""
        if axis == "F" and layer is not None:
            return self.ffn_widths[layer]
        size: int = getattr(self, AXES[axis].size)
        return size

    def rows(self, axis: str) -> int:
        """Tensor rows one index of the axis owns: a head has `kv_channels` of them."""
        return self.kv_channels if AXES[axis].has_channels else 1

    def legal_tensor_parallel_sizes(self, limit: int = 1024) -> list[int]:
        """TP sizes that divide heads, groups and FFN channels (the vocabulary is padded)."""
        sizes = self._split_sizes().values()
        return [n for n in range(1, min(limit, *sizes) + 1) if all(s % n == 0 for s in sizes)]

    def check_tensor_parallel(self, size: int) -> None:
        """Refuse a TP size that does not divide this shape.

        Raises:
            ShapeError: with the sizes that do.
        """
        if size < 1:
            raise ShapeError(f"tensor-model-parallel-size is {size}; wanted 1 or more")
        for name, found in self._split_sizes().items():
            if found % size:
                legal = ", ".join(map(str, self.legal_tensor_parallel_sizes()))
                raise ShapeError(
                    f"tensor-model-parallel-size {size} does not divide {name} "
                    f"{found}; legal for this shape: {legal}"
                )

    def _split_sizes(self) -> dict[str, int]:
        """What tensor parallelism has to divide; the vocabulary is padded."""
        sizes = {
            axis.size: self.size(letter)
            for letter, axis in AXES.items()
            if axis.is_split and letter != "V"
        }
        if self.ffn_per_layer is not None:
            del sizes[AXES["F"].size]
            sizes["ffn_per_layer's greatest common divisor"] = gcd(*self.ffn_per_layer)
        return sizes

    def check_uniform(self, who: str, instead: str) -> None:
        """Refuse layers of different widths, which ``who`` cannot work with.

        Raises:
            ShapeError: with the widths, and ``instead``, what to do.
        """
        if self.ffn_per_layer is not None:
            raise ShapeError(
                f"{who}: layers have {min(self.ffn_per_layer)} to {self.ffn_hidden_size} FFN "
                f"channels; wanted equally many in every layer; {instead}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``ffn_per_layer`` only where layers differ."""
        values = asdict(self)
        widths = values.pop("ffn_per_layer")
        return values if widths is None else {**values, "ffn_per_layer": list(widths)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelShape:
        """Raises ShapeError when a key is missing or unknown."""
        names = {field.name for field in fields(cls)} - {"ffn_per_layer"}
        values = dict(values)
        widths = values.pop("ffn_per_layer", None)
        if set(values) != names:
            missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
            raise ShapeError(f"shape: missing {missing}, unknown {unknown}; wanted {sorted(names)}")
        return cls(**values, ffn_per_layer=None if widths is None else tuple(widths))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything but the weights that the model's function depends on.

    ``rope_scaling`` holds Hugging Face's parameters of a scaled rope (``rope_type``, ``factor``,
    ...; never the base), None for the plain one. ``hf_config`` is the source's own config.json as
    read, so that export gives back what we do not interpret; empty when the source had none.
    """

    family: Family
    shape: ModelShape
    tied: bool
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    init_method_std: float = 0.02
    dtype: str = "fp32"
    hf_config: Mapping[str, Any]
