"""Law 4: the sliced model's logits are the source's with the dropped parts zeroed, in float64.

transformers computes both. Each case has a control: the source with nothing zeroed must differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pico import IDS, ok

HEADS = ("--num-attention-heads-remain", 3)
FFN = ("--ffn-hidden-size-remain", 33, "--prune-type", "unbalance")
LAYERS = ("--drop-layers", "1-2")


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def zero_dropped(model: Any, plan: dict[str, Any]) -> None:
    """Zero the outputs of what the plan drops, where it meets the hidden stream again."""
    kept, shape = plan["kept"], plan["source"]
    width = shape["kv_channels"]
    layers = kept["layers"] or list(range(shape["num_layers"]))
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn.o_proj, layer.mlp.down_proj
        if number not in layers:
            for linear in (attention, mlp):
                for parameter in linear.parameters():  # the bias too
                    parameter.data.zero_()
            continue
        if kept["heads"] is not None:
            for head in set(range(shape["num_attention_heads"])) - set(kept["heads"][str(number)]):
                attention.weight.data[:, head * width : (head + 1) * width] = 0
        if kept["ffn"] is not None:
            dropped = set(range(shape["ffn_hidden_size"])) - set(kept["ffn"][str(number)])
            mlp.weight.data[:, sorted(dropped)] = 0


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("gqa", HEADS),
        ("four", ("--num-query-groups-remain", 3)),
        ("four", ("--num-query-groups-remain", 2, "--num-attention-heads-remain", 2)),
        ("mha", HEADS),
        ("mqa", HEADS),
        ("gqa", FFN),
        ("gqa", LAYERS),
        ("all_bias", (*HEADS, *FFN, *LAYERS)),
        ("qwen", (*HEADS, *FFN, *LAYERS)),
        ("qwen3", (*HEADS, *FFN, *LAYERS)),
        ("tied", (*HEADS, *FFN, *LAYERS)),
        ("mistral", (*HEADS, *FFN, *LAYERS)),
        ("llama3", (*HEADS, *FFN, *LAYERS)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_slicing_equals_zeroing(
    kind: str, flags: tuple, models: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = tmp_path / "p.json"
    ok("plan", "--load", models(kind), "--save", plan, *flags)
    out = ("--save", tmp_path / "p", "--to", "hf")
    ok("prune", "--load", models(kind), "--plan", plan, *out)
    source = load(models(kind))
    control = logits(source)
    zero_dropped(source, json.loads(plan.read_text()))
    zeroed, sliced = logits(source), logits(load(tmp_path / "p"))
    assert control.abs().max() > 0.5
    assert (sliced - zeroed).abs().max() < 1e-10
    assert (sliced - control).abs().max() > 1e-3, "nothing was pruned: this test cannot fail"
