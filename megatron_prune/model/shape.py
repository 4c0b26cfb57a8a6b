"""What a model is, apart from its weights: its sizes (`ModelShape`) and the rest (`ModelConfig`).

Nothing here knows a file format or a tensor; `axes` knows the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import gcd
from typing import Any

from megatron_prune.errors import ShapeError


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
                raise ShapeError(f"{name} is {size!r}; wanted a positive integer")
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
        """Indices along a named axis (`axes` has the letters), of a layer where layers differ;
        without one the largest."""
        if axis == "F" and layer is not None:
            return self.ffn_widths[layer]
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "Q": self.num_attention_heads,
            "K": self.num_query_groups,
            "F": self.ffn_hidden_size,
            "L": self.num_layers,
        }[axis]

    def rows(self, axis: str) -> int:
        """Tensor rows one index of the axis owns: a head has `kv_channels` of them."""
        return self.kv_channels if axis in "QK" else 1

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
        """What tensor parallelism has to divide."""
        is_uniform = self.ffn_per_layer is None
        ffn = "ffn_hidden_size" if is_uniform else "ffn_per_layer's greatest common divisor"
        return {
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            ffn: self.ffn_hidden_size if self.ffn_per_layer is None else gcd(*self.ffn_per_layer),
        }

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

    family: str
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
