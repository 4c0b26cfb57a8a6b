"""The arithmetic of low-rank factors, against plain loops."""

from __future__ import annotations

import pytest
import torch

from megatron_prune.errors import ConfigError
from megatron_prune.model.lora import (
    TARGETS,
    Lora,
    check_lora,
    check_rank,
    factor_shapes,
    merged,
    parse_targets,
)
from megatron_prune.model.shape import ModelShape

SHAPE = ModelShape(
    num_layers=4, hidden_size=48, ffn_hidden_size=96, num_attention_heads=6, num_query_groups=3,
    kv_channels=8, vocab_size=379,
)  # fmt: skip


def _drawn(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(dtype)


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_merged_is_the_papers_sum(keep_zeros: bool) -> None:
    weight, a, b = _drawn(5, 7), _drawn(2, 7), _drawn(5, 2)
    weight[1, 3] = weight[4, 0] = 0
    found = merged(weight, a, b, Lora(rank=2, alpha=3.0, keep_zeros=keep_zeros))
    for i in range(5):
        for j in range(7):
            wanted = weight[i, j] + 3 / 2 * sum(b[i, k] * a[k, j] for k in range(2))
            if keep_zeros and weight[i, j] == 0:
                assert found[i, j] == 0
            else:
                assert float(found[i, j]) == pytest.approx(float(wanted), abs=1e-6)
    assert (found[1, 3] == 0) == keep_zeros


def test_merged_rounds_once() -> None:
    """In bf16: the sum of float32 values, rounded at the end; not a sum of rounded products."""
    weight, a, b = (_drawn(*s, dtype=torch.bfloat16) for s in ((64, 48), (8, 48), (64, 8)))
    lora = Lora(rank=8, alpha=1.0)
    found = merged(weight, a, b, lora)
    wanted = (weight.double() + b.double() @ a.double() / 8).to(torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert (found != wanted).float().mean() < 0.01
    assert (weight + (b @ a) / 8 != wanted).float().mean() > 0.1


def test_factors_span_the_fused_linears() -> None:
    found = {target: factor_shapes(target, SHAPE, 2) for target in TARGETS}
    assert found == {
        "linear_qkv": {"lora_A": (2, 48), "lora_B": (48 + 24 + 24, 2)},
        "linear_proj": {"lora_A": (2, 48), "lora_B": (48, 2)},
        "linear_fc1": {"lora_A": (2, 48), "lora_B": (192, 2)},
        "linear_fc2": {"lora_A": (2, 96), "lora_B": (48, 2)},
    }


def test_targets_may_have_hugging_faces_names_where_these_are_whole_linears() -> None:
    assert parse_targets(["down_proj", "linear_qkv", "o_proj"]) == (
        *("linear_qkv", "linear_proj", "linear_fc2"),
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["linear_q"], "linear_q: wanted some of linear_qkv, linear_proj"),
        (["v_proj"], "v_proj: is a part of linear_qkv, whose parts share one A"),
        (["o_proj", "linear_proj"], "o_proj linear_proj: names a linear twice"),
    ],
)
def test_other_targets_are_refused(given: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_targets(given)


def test_impossible_factors_are_refused() -> None:
    with pytest.raises(ConfigError, match="--lora-alpha is nan; wanted more than 0"):
        check_lora(Lora(rank=2, alpha=float("nan")))
    with pytest.raises(ConfigError, match="--lora-rank is 0"):
        check_lora(Lora(rank=0, alpha=1.0))
    check_rank(Lora(rank=48, alpha=1.0), SHAPE)
    with pytest.raises(ConfigError, match="--lora-rank 49: linear_qkv is 96 x 48, of rank 48"):
        check_rank(Lora(rank=49, alpha=1.0), SHAPE)
