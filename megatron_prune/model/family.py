"""What a family of models is: its weights, how they hang together, and how its config.json is read.

These are the types alone: `blocks` has the pieces that families are made of, and `families` has one
file for each family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_prune.model.shape import ModelConfig, ModelShape


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of the model.

    Attributes:
        name: canonical; without the layer's prefix for one of a layer.
        axes: one letter for each dim, see `shape.AXES`. The same name has the same axes in every
            family.
        hf: Hugging Face's name, without the layer's prefix likewise.
        hf_block: which of how many equal blocks of that tensor's rows it is.
        when: the field of `ModelConfig` that says whether there is one; ``untied`` for not tied.
    """

    name: str
    axes: str
    hf: str
    hf_block: tuple[int, int] = (0, 1)
    when: str = ""


@dataclass(frozen=True, kw_only=True)
class Half:
    """Attention or MLP of a layer, by Megatron's modules.

    Attributes:
        norm: the norm before it, which ``readers`` read.
        readers: its linears that read the norm's output.
        projection: its linear that writes back into the hidden state.
        axis: letter of the projection's inputs.
    """

    module: str
    norm: str
    readers: tuple[str, ...]
    projection: str
    axis: str

    @property
    def output(self) -> str:
        """The projection's canonical name in a layer, without ``.weight``."""
        return f"{self.module}.{self.projection}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The readers' canonical names in a layer, without ``.weight``."""
        return tuple(f"{self.module}.{reader}" for reader in self.readers)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Family:
    """What sets one family apart; there is one object of each.

    Attributes:
        name: ours, as checkpoints and ``--family`` have it.
        model_type, architecture: Hugging Face's ``model_type`` and causal-LM class.
        layer, outer: weights of a layer and of the rest, in the order of the forward pass.
        hf_layers: what Hugging Face calls the list of layers.
        halves: of a layer, in the order of the forward pass.
        norm, activation: as Megatron calls them; ``is_gated`` where the activation's output is
            multiplied by a second projection.
        read: config.json's values -> the model's facts.
        window: config.json's values -> tokens that a layer with a window reaches, None where no
            layer has one.
        write_widths: the keys of config.json that say layers of different FFN widths; None where
            nothing that reads the family knows any.
        fresh: the keys of config.json that only this family has, of a model that came without one.
        defaults: what transformers assumes for keys that config.json leaves out.
        always_qkv_bias: ``linear_qkv`` has a bias in every model of the family.
        has_windows: Megatron's arguments with a window are of this family.
        hidden_multiple_of_heads: transformers (5.x) refuses a config.json whose hidden_size is not
            a multiple of its heads, though ``head_dim`` is given.
        head_dim_derived_by: engines that do not read ``head_dim`` for this family and take
            hidden_size / heads (TGI of January 2026, mlx-lm of August 2026, vLLM and SGLang of
            2025, read in their sources).
    """

    name: str
    model_type: str
    architecture: str
    layer: tuple[Weight, ...]
    outer: tuple[Weight, ...]
    hf_layers: str = "model.layers"
    halves: tuple[Half, ...]
    norm: str = "RMSNorm"
    activation: str = "silu"
    is_gated: bool = True
    read: Callable[[Mapping[str, Any]], ModelConfig]
    window: Callable[[Mapping[str, Any]], int | None] = lambda values: None
    write_widths: Callable[[ModelShape], Mapping[str, Any]] | None = None
    fresh: Callable[[ModelConfig], Mapping[str, Any]] = lambda config: {}
    defaults: Mapping[str, Any] = field(default_factory=dict)
    always_qkv_bias: bool = False
    has_windows: bool = False
    hidden_multiple_of_heads: bool = False
    head_dim_derived_by: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.name

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys of every head are normalised."""
        return any("C" in weight.axes for weight in self.layer)

    @property
    def ffn_matrices(self) -> int:
        """Matrices of one layer between the hidden state and the FFN channels: 3 when gated."""
        return sum(sorted(weight.axes) == ["D", "F"] for weight in self.layer)
