"""Gates folded into weights: every value against a loop, the model against one that is gated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_prune.errors import ShapeError
from megatron_prune.families import read_config
from megatron_prune.families.config import hf_name
from megatron_prune.model.axes import axes_of, names, split_dim, split_layer
from megatron_prune.model.shape import ModelConfig
from megatron_prune.shearing.folding import Gates, fold
from tests import pico
from tests.gates import ALL, random_gates

Models = Callable[[str], Path]
CASES = [
    ("gqa", ALL),
    ("tied", ALL),
    ("mha", ALL),
    ("mqa", "DK"),
    ("all_bias", ALL),
    ("all_bias", "L"),
    ("qwen3", "QF"),
    ("qwen_tied", "DL"),
    ("bf16", ALL),
    ("fp16", "DKF"),
]


def given(models: Models, kind: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the tensors by their canonical names."""
    config = read_config(models(kind) / "config.json")
    stored = pico.tensors(models(kind))
    return config, {name: stored[hf_name(name, config.family)] for name in names(config)}


def looped(hf: str, x: Tensor, config: ModelConfig, gates: Gates) -> Tensor:
    """By Hugging Face's name, value by value, in numpy's float32."""
    shape, one = config.shape, np.float32(1)
    layer = int(hf.split(".")[2]) if ".layers." in hf else 0

    def gate(axis: str, *at: int) -> np.float32:
        return np.float32(gates.by_axis[axis][at].item()) if axis in gates.by_axis else one

    def head_gate(column: int) -> np.float32:
        head = column // shape.kv_channels
        group = head // (shape.num_attention_heads // shape.num_query_groups)
        return gate("Q", layer, head) * gate("K", layer, group)

    hidden = [gate("D", i) for i in range(shape.hidden_size)]
    out = [h * gate("L", layer) for h in hidden]
    rows, columns = [one] * len(x), [one] * x.shape[-1]
    kind = hf.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
    if kind == "embed_tokens":
        columns = hidden
    elif kind.endswith("layernorm") or (hf == "model.norm.weight" and not config.tied):
        rows = hidden
    elif kind in ("o_proj", "down_proj"):
        rows = out
        if kind == "o_proj":
            columns = [head_gate(i) for i in range(x.shape[-1])]
        else:
            columns = [gate("F", layer, i) for i in range(x.shape[-1])]
    values = x.float().numpy()
    made = np.empty_like(values)
    for place in np.ndindex(values.shape):
        made[place] = values[place] * rows[place[0]]
        if x.ndim == 2:
            made[place] *= columns[place[1]]
    return torch.from_numpy(made).to(x.dtype)


@pytest.mark.parametrize(("kind", "axes"), CASES)
def test_every_value_is_multiplied_by_its_gates(kind: str, axes: str, models: Models) -> None:
    config, tensors = given(models, kind)
    gates = random_gates(config.shape, axes)
    wanted = {n: looped(hf_name(n, config.family), x, config, gates) for n, x in tensors.items()}
    before = {name: x.clone() for name, x in tensors.items()}
    pico.assert_same({n: fold(n, x, config, gates) for n, x in tensors.items()}, wanted)
    pico.assert_same(tensors, before)  # what is read may be a map of the file
    changed = {n for n, x in tensors.items() if not torch.equal(wanted[n], x)}
    assert changed and not any("linear_q" in n or "output_layer" in n for n in changed)


@pytest.mark.parametrize(("kind", "axes"), CASES)
def test_a_part_has_the_bits_of_the_whole(kind: str, axes: str, models: Models) -> None:
    config, tensors = given(models, kind)
    gates = random_gates(config.shape, axes)

    def parts(name: str, x: Tensor, dim: int) -> Iterator[Tensor]:
        axis = axes_of(name)[dim]
        rows, size = config.shape.rows(axis), config.shape.size(axis, split_layer(name)[0])
        for start in range(0, size, 5):
            part = x.narrow(dim, start * rows, min(5, size - start) * rows)
            yield fold(name, part, config, gates, start, None if start + 5 >= size else start + 5)

    for name, x in tensors.items():
        if (dim := split_dim(axes_of(name))) is not None:
            whole = fold(name, x, config, gates)
            assert torch.cat([*parts(name, x, dim)], dim).equal(whole), name


def test_what_has_no_gate_is_not_copied(models: Models) -> None:
    config, tensors = given(models, "qwen3")
    gates = random_gates(config.shape, "F")
    same = {name for name, x in tensors.items() if fold(name, x, config, gates) is x}
    assert {*tensors} - same == {n for n in tensors if n.endswith("mlp.linear_fc2.weight")}


def gated_logits(folder: Path, gates: Gates) -> Tensor:
    """transformers' model in float64, whose activations are multiplied by hooks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    by_axis, width = {k: x.double() for k, x in gates.by_axis.items()}, gates.shape.kv_channels
    hidden, layers = by_axis["D"], by_axis["L"]

    def after(module: Any, factor: Tensor) -> None:
        module.register_forward_hook(lambda module, inputs, output: output * factor)

    def before(module: Any, factor: Tensor) -> None:
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factor,))

    after(model.model.embed_tokens, hidden)
    after(model.model.norm, hidden)
    for number, layer in enumerate(model.model.layers):
        heads, groups = by_axis["Q"][number], by_axis["K"][number]
        group = torch.arange(len(heads)) // (len(heads) // len(groups))
        after(layer.input_layernorm, hidden)
        after(layer.post_attention_layernorm, hidden)
        before(
            layer.self_attn.o_proj,
            (heads * groups[group])[torch.arange(len(heads) * width) // width],
        )
        after(layer.self_attn.o_proj, hidden * layers[number])
        before(layer.mlp.down_proj, by_axis["F"][number])
        after(layer.mlp.down_proj, hidden * layers[number])
    with torch.no_grad():
        return model(pico.IDS).logits


@pytest.mark.parametrize("kind", ["gqa", "tied", "mha", "all_bias", "qwen3", "qwen_tied"])
def test_a_folded_model_computes_what_the_gated_one_does(
    kind: str, models: Models, tmp_path: Path
) -> None:
    """Twin in float64: the folded weights are rounded to float32. The control is without gates."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config, tensors = given(models, kind)
    gates = random_gates(config.shape)
    folded = {hf_name(n, config.family): fold(n, x, config, gates) for n, x in tensors.items()}
    save_file(folded, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((models(kind) / "config.json").read_bytes())
    with torch.no_grad():
        found, plain = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)(pico.IDS).logits
            for path in (tmp_path, models(kind))
        )
    wanted = gated_logits(models(kind), gates)
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() < 1e-6 * scale
    assert (plain - wanted).abs().max() > 0.1 * scale


@pytest.mark.parametrize(
    ("axis", "change", "says"),
    [
        ("F", lambda x: x[:, :-1], r"gates of ffn: are \(4, 95\) torch.float32; wanted \(4, 96\)"),
        ("D", lambda x: x[None], r"gates of hidden: are \(1, 48\) torch.float32; wanted \(48,\)"),
        ("Q", lambda x: x.double(), r"heads: are \(4, 6\) torch.float64; wanted \(4, 6\) torch.fl"),
        ("F", lambda x: x.index_fill(1, torch.tensor([7]), torch.nan),
         "gates of ffn: layer 0, FFN channel 7 has nan; wanted a number, 0 or more"),
        ("K", lambda x: -x, "query_groups: layer 0, query group 0 has -0.*; wanted a number, 0 or"),
        ("L", lambda x: x / 0, "gates of layers: layer 0 has inf; wanted a number, 0 or more"),
        ("D", lambda x: x * 0, "gates of hidden: hidden channel 0 has 0; wanted a number, above 0"),
        ("V", lambda x: torch.ones(379), r"gates of axis 'V'; wanted some of \['D', 'Q', 'K', 'F'"),
        (None, None, r"no gates; wanted some of the axes \['D'"),
    ],
)  # fmt: skip
def test_gates_that_do_not_fit_are_refused(
    axis: str | None, change: Any, says: str, models: Models
) -> None:
    shape = read_config(models("gqa") / "config.json").shape
    gates = random_gates(shape, "DQKFL").by_axis
    changed = {} if axis is None else {axis: change(gates.get(axis))}
    with pytest.raises(ShapeError, match=says):
        Gates(shape=shape, by_axis=changed)


def test_ffn_gates_of_layers_that_differ_are_refused(models: Models) -> None:
    from dataclasses import replace

    shape = read_config(models("gqa") / "config.json").shape
    uneven = replace(shape, ffn_per_layer=(96, 80, 80, 80))
    with pytest.raises(ShapeError, match="gates of ffn: layers have 80 to 96 FFN channels"):
        random_gates(uneven, "F")
    assert random_gates(uneven, "DQKL").words == ("hidden", "heads", "query_groups", "layers")
