"""What the references of the criteria share: transformers' model, the text, and plain hooks.

Nothing here or in the tests beside it uses the product but for running `score`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SAMPLES, SEQ = 5, 24  # in batches of 2: the last one is filled up with what must not count
REMOVAL_SAMPLES, REMOVAL_LAYERS = 3, 2
CRITERIA = (
    *("magnitude", "activation", "wanda", "flap", "residual-energy"),
    *("taylor", "fisher", "perplexity", "perplexity-greedy"),
)
KINDS = ("gqa", "tied", "all_bias", "qwen", "qwen3")


@dataclass(frozen=True)
class Scored:
    """A pico model, its calibration windows, and what `score` wrote about it.

    Attributes:
        scores: the file's tensors: ``wanda.Q`` and so on.
        model: transformers' own, float32.
        ids_WS: [SAMPLES, SEQ] token ids.
    """

    scores: dict[str, Tensor]
    model: Any
    ids_WS: Tensor

    @property
    def layers(self) -> list[Any]:
        return list(self.model.model.layers)

    @property
    def norms(self) -> list[Any]:
        """All of them, in the order of the forward pass."""
        both = [(x.input_layernorm, x.post_attention_layernorm) for x in self.layers]
        return [norm for pair in both for norm in pair] + [self.model.model.norm]

    @property
    def heads(self) -> list[list[int]]:
        """The rows of q_proj (columns of o_proj) that each head owns."""
        return _units(self.model.config.num_attention_heads, self.layers[0].self_attn.head_dim)

    @property
    def groups(self) -> list[list[int]]:
        """The rows of k_proj and v_proj that each group owns."""
        return _units(self.model.config.num_key_value_heads, self.layers[0].self_attn.head_dim)


def _units(count: int, width: int) -> list[list[int]]:
    return [list(range(i * width, (i + 1) * width)) for i in range(count)]


@torch.no_grad()
def seen(scored: Scored, modules: list[Any], what: str) -> list[list[Tensor]]:
    """[sample][module] -> [SEQ, n] float64: the ``input`` or ``output`` of modules."""
    found: list[list[Tensor]] = []
    for ids_S in scored.ids_WS:
        here: dict[int, Tensor] = {}
        hooks = []
        for number, module in enumerate(modules):

            def hook(
                _: Any, args: Any, out: Any, into: dict[int, Tensor] = here, number: int = number
            ) -> None:
                x = args[0] if what == "input" else out
                into[number] = (x[0] if isinstance(x, tuple) else x)[0].double()

            hooks.append(module.register_forward_hook(hook))
        scored.model(ids_S[None])
        for handle in hooks:
            handle.remove()
        found.append([here[number] for number in range(len(modules))])
    return found


def named_units(scored: Scored) -> dict[str, list[tuple[str, int, Any, list[int]]]]:
    """Parameter name -> (axis, layer or 0, which dim, rows of each unit) of what it belongs to."""
    config = scored.model.config
    hidden, ffn = _units(config.hidden_size, 1), _units(config.intermediate_size, 1)
    of = {
        "q_proj.weight": [("Q", 0, scored.heads), ("D", 1, hidden)],
        "k_proj.weight": [("K", 0, scored.groups), ("D", 1, hidden)],
        "v_proj.weight": [("K", 0, scored.groups), ("D", 1, hidden)],
        "q_proj.bias": [("Q", 0, scored.heads)],
        "k_proj.bias": [("K", 0, scored.groups)],
        "v_proj.bias": [("K", 0, scored.groups)],
        "o_proj.weight": [("D", 0, hidden), ("Q", 1, scored.heads)],
        "o_proj.bias": [("D", 0, hidden)],
        "gate_proj.weight": [("F", 0, ffn), ("D", 1, hidden)],
        "up_proj.weight": [("F", 0, ffn), ("D", 1, hidden)],
        "gate_proj.bias": [("F", 0, ffn)],
        "up_proj.bias": [("F", 0, ffn)],
        "down_proj.weight": [("D", 0, hidden), ("F", 1, ffn)],
        "down_proj.bias": [("D", 0, hidden)],
        "embed_tokens.weight": [("D", 1, hidden)],
        "lm_head.weight": [("D", 1, hidden)],
        "q_norm.weight": [],
        "k_norm.weight": [],
    }
    found = {}
    for name, _ in scored.model.named_parameters():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        owners = of.get(".".join(name.split(".")[-2:]), [("D", 0, hidden)])  # else a norm
        found[name] = [(axis, layer, dim, units) for axis, dim, units in owners]
    return found


def unit_sums(scored: Scored, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of values, one a weight, over the weights that each unit owns; a group with its heads.

    Args:
        values: parameter name -> a tensor of the parameter's shape.
    """
    config, layers = scored.model.config, len(scored.layers)
    sizes = {
        "D": (config.hidden_size,),
        "Q": (layers, config.num_attention_heads),
        "K": (layers, config.num_key_value_heads),
        "F": (layers, config.intermediate_size),
        "L": (layers,),
    }
    sums = {axis: torch.zeros(size).double() for axis, size in sizes.items()}
    for name, owners in named_units(scored).items():
        for axis, layer, dim, units in owners:
            for unit, rows in enumerate(units):
                part = values[name].index_select(dim, torch.tensor(rows)).double().sum()
                if axis == "D":
                    sums[axis][unit] += part
                else:
                    sums[axis][layer, unit] += part
        if ".layers." in name:
            sums["L"][int(name.split(".")[2])] += values[name].double().sum()
    per_group = config.num_attention_heads // config.num_key_value_heads
    for head in range(config.num_attention_heads):
        sums["K"][:, head // per_group] += sums["Q"][:, head]
    return sums


def far(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found.double() - wanted.double()).abs().max() / wanted.abs().max())


def assert_scores(scored: Scored, criterion: str, wanted: dict[str, Tensor]) -> None:
    """The file holds exactly these axes of a criterion, within float32's rounding."""
    prefix = f"{criterion}."
    found = {
        name.removeprefix(prefix): x for name, x in scored.scores.items() if name.startswith(prefix)
    }
    assert set(found) == set(wanted)
    for axis, x in wanted.items():
        assert found[axis].dtype == torch.float32
        assert far(found[axis], x) < 1e-5, axis
        spread = float((x.max() - x.min()) / x.abs().max())
        assert spread > 1e-3, f"{axis}: units alike to within {spread} would tell nothing"
