"""Our methods against the official code, on a trained model, layer by layer."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from megatron_prune.sparsity.method import How
from tests.sparsity.official import MODEL, official, sparsified

MASKS = [
    ("magnitude-0.5", "magnitude", How()),
    ("magnitude-2of4", "magnitude", How()),
    ("wanda-0.5", "wanda", How()),
    ("wanda-0.6", "wanda", How()),
    ("wanda-4of8", "wanda", How()),
    ("wanda_variant-0.5", "wanda", How(variant=True)),
]
WEIGHTS = [
    ("sparsegpt-0.5", "sparsegpt", How()),
    ("sparsegpt-2of4", "sparsegpt", How()),
    ("ablate_mag_iter-0.5", "magnitude", How(weight_update="iter")),
    ("ablate_mag_seq-2of4", "magnitude", How(weight_update="seq")),
    ("ablate_wanda_iter-2of4.mean", "wanda", How(weight_update="iter")),
    ("ablate_wanda_seq-0.5.mean", "wanda", How(weight_update="seq")),
    ("ablate_wanda_iter-0.5", "wanda", How(weight_update="iter")),
]


def pattern_of(label: str) -> str:
    return label.removesuffix(".mean").rsplit("-", 1)[1].replace("of", ":")


@pytest.mark.parametrize(("label", "method", "how"), MASKS, ids=[x[0] for x in MASKS])
def test_masks_are_the_official_ones_and_kept_weights_the_sources(label, method, how) -> None:
    found, _ = sparsified(method, pattern_of(label), how)
    kept, _ = official(label)
    source = load_file(MODEL / "model.safetensors")
    assert found.keys() == kept.keys()
    for name, weight in found.items():
        assert weight.equal(source[name] * kept[name]), name


@pytest.mark.parametrize(("label", "method", "how"), WEIGHTS, ids=[x[0] for x in WEIGHTS])
def test_updated_weights_are_the_official_ones(label, method, how) -> None:
    # the official statistics of the ablations of Wanda weigh the k-th window 1 / k
    upstream = "wanda" in label and not label.endswith(".mean")
    found, _ = sparsified(method, pattern_of(label), how, upstream_statistics=upstream)
    kept, values = official(label)
    assert found.keys() == kept.keys() and len(values) >= 7
    for name, weight in found.items():
        assert (weight != 0).equal(kept[name]), name
    for name, wanted in values.items():
        assert (found[name] - wanted).norm() < 1e-6 * wanted.norm(), name


def test_the_weighting_of_windows_is_what_tells_the_two_apart() -> None:
    """A control: with the other statistics masks differ by 1.4% and more."""
    found, _ = sparsified("wanda", "0.5", How(weight_update="iter"))
    kept, _ = official("ablate_wanda_iter-0.5")
    differing = sum(int(((found[n] != 0) != mask).sum()) for n, mask in kept.items())
    assert differing > 0.014 * sum(mask.numel() for mask in kept.values())
