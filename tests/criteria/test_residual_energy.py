"""Residual energy against a loop over the norms of transformers' model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.criteria.loops import KINDS, Scored, assert_scores, far, seen


def _energy(one: Scored) -> Tensor:
    """[norms, D]: mean over tokens of (x / rms(x))^2, x the norm's input."""
    total, eps = torch.zeros(len(one.norms), one.model.config.hidden_size).double(), 1e-6
    for sample in seen(one, one.norms, "input"):
        for norm, x_SD in enumerate(sample):
            for x_D in x_SD:
                total[norm] += x_D**2 / ((x_D**2).mean() + eps)
    return total / one.ids_WS.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_is_its_share_of_the_normalised_stream(
    kind: str, scored: Callable[[str], Scored]
) -> None:
    one = scored(kind)
    energy = _energy(one)
    assert_scores(one, "residual-energy", {"D": energy.mean(0)})
    assert far(one.scores["statistics.norm_energy"], energy) < 1e-5
    assert float(one.scores["residual-energy.D"].mean()) == pytest.approx(1.0, abs=1e-3)


def test_with_the_norms_weights_it_would_give_other_scores(
    scored: Callable[[str], Scored],
) -> None:
    one = scored("gqa")
    weights = torch.stack([norm.weight.detach().double() for norm in one.norms])
    assert far(one.scores["residual-energy.D"], (_energy(one) * weights**2).mean(0)) > 0.01
