"""What holds for every method: the layout does not matter, patterns hold, zeros stay."""

from __future__ import annotations

import pytest
import torch

from megatron_prune.sparsity.method import METHODS, Asked, Pattern
from tests.sparsity.problems import DEAD, HALF, PATTERNED, TWO_OF_FOUR, WAYS, make_problem
from tests.sparsity.ranks import on_ranks, split_rows

MASK_ONLY = ["magnitude", "wanda", "variant"]
DEALINGS = [[[24, 24], [8, 8]], [[30, 1, 17], [0, 16, 0]], [[48, 0], [0, 16]]]
PROBLEM = make_problem()


def test_every_method_is_tried() -> None:
    assert {name for name, _ in WAYS.values()} == set(METHODS)


@pytest.mark.parametrize("asked", [HALF, TWO_OF_FOUR], ids=["0.5", "2:4"])
@pytest.mark.parametrize("way", WAYS)
def test_it_does_not_matter_how_rows_are_dealt(way, asked) -> None:
    if asked.pattern and way not in PATTERNED:
        return
    prepared = PROBLEM.prepared(way)
    alone = PROBLEM.solved(way, asked, prepared=prepared)
    for shares in DEALINGS:
        parts = [split_rows(w, n) for w, n in zip(PROBLEM.weights, shares)]
        ranks = on_ranks(
            len(shares[0]),
            lambda d, parts=parts: PROBLEM.solved(
                way, asked, [part[d.rank] for part in parts], prepared, d
            ),
        )
        for i, whole in enumerate(alone):
            joined = torch.cat([rank[i].weight_RI for rank in ranks])
            assert (joined != 0).equal(whole.weight_RI != 0)
            torch.testing.assert_close(joined, whole.weight_RI, rtol=2e-5, atol=2e-6)
            assert sum(rank[i].close for rank in ranks) == whole.close


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "8:16", "20:24"])
@pytest.mark.parametrize("way", PATTERNED)
def test_patterns_hold(way, pattern) -> None:
    problem = make_problem(dead=False)
    found = Pattern.parse(pattern)
    asked = Asked(share=1 - found.keep / found.group, pattern=found)
    for each in problem.solved(way, asked):
        counts = (each.weight_RI != 0).view(len(each.weight_RI), -1, found.group).sum(2)
        assert (counts == found.keep).all()


@pytest.mark.parametrize("way", WAYS)
def test_shares_are_as_asked_for(way) -> None:
    """Magnitude and SparseGPT have one more a threshold; the variant is within 0.001."""
    problem = make_problem(dead=False)
    blocks = -(-96 // 40)
    most = {"variant": 0.0011, "wanda": 0.0}.get(way, blocks / (16 * 96))
    for each in problem.solved(way, Asked(share=0.6)):
        wanted = int(96 * 0.6) / 96 if way.startswith("wanda") and "iter" not in way else 0.6
        zeros = float((each.weight_RI == 0).float().mean())
        assert zeros == pytest.approx(wanted, abs=most + 1e-6)


@pytest.mark.parametrize(
    "asked", [HALF, Asked(share=0.2), TWO_OF_FOUR], ids=["0.5", "fewer than there are", "2:4"]
)
@pytest.mark.parametrize("way", WAYS)
def test_zeros_stay_and_are_positive_and_arguments_are_left_alone(way, asked) -> None:
    if asked.pattern and way not in PATTERNED:
        return
    draw = torch.Generator().manual_seed(1)
    sparse = [w * (torch.rand(w.shape, generator=draw) > 0.3) for w in PROBLEM.weights]
    sparse[0][3] = 0  # an output that is off
    sparse[0][4, :80] = 0  # more zeros than are asked for
    assert any(((w == 0) & w.signbit()).any() for w in sparse)
    before = [w.clone() for w in sparse]
    prepared = PROBLEM.prepared(way)
    kept_prepared = {name: x.clone() for name, x in prepared.items()}
    for w, each in zip(sparse, PROBLEM.solved(way, asked, sparse, prepared)):
        assert (each.weight_RI[w == 0] == 0).all()
        assert not each.weight_RI[each.weight_RI == 0].signbit().any()
        assert each.weight_RI.isfinite().all()
        assert each.weight_RI.dtype == torch.float32 and each.weight_RI.is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip(sparse, before))
    assert all(torch.equal(prepared[name], x) for name, x in kept_prepared.items())


@pytest.mark.parametrize("way", ["sparsegpt", "wanda iter", "admm", "alps"])
def test_zeros_that_stay_count_among_those_asked_for(way) -> None:
    """Of each block and matrix, and one of each group."""
    draw = torch.Generator().manual_seed(1)
    problem = make_problem(dead=False)
    for asked in (HALF, TWO_OF_FOUR):
        zero = torch.rand(48, 24, 4, generator=draw).argsort(2) < 1
        sparse = problem.weights[0].masked_fill(zero.view(48, 96), 0)
        found = problem.solved(way, asked, [sparse])[0].weight_RI
        if asked.pattern:
            assert ((found != 0).view(48, 24, 4).sum(2) == 2).all()
        else:
            assert (found == 0).float().mean() == pytest.approx(0.5, abs=3 / (48 * 96) + 1e-6)


def test_of_equal_weights_the_earlier_goes() -> None:
    """In a row, as a stable sort has it, and in a group."""
    equal = torch.ones(2, 96)
    equal[1, :60] = 2
    prepared = {"norm_I": torch.ones(96), "factor_II": torch.eye(96), "dead_I": torch.zeros(96) > 0}
    kept = PROBLEM.solved("wanda", HALF, [equal], prepared)[0].weight_RI != 0
    assert kept[0].tolist() == [False] * 48 + [True] * 48
    assert kept[1].tolist() == [False] * 12 + [True] * 48 + [False] * 36
    for way in ("wanda", "magnitude", "sparsegpt"):
        for group in (4, 24):
            asked = Asked(share=0.5, pattern=Pattern(keep=group // 2, group=group))
            kept = PROBLEM.solved(way, asked, [torch.ones(2, 96)], prepared)[0].weight_RI != 0
            halves = kept.view(-1, 2, group // 2)
            assert not halves[:, 0].any() and halves[:, 1].all(), way


@pytest.mark.parametrize("way", MASK_ONLY)
def test_kept_weights_of_masks_are_the_sources(way) -> None:
    for dense, each in zip(PROBLEM.weights, PROBLEM.solved(way, HALF)):
        kept = each.weight_RI != 0
        assert each.weight_RI[kept].equal(dense[kept])


@pytest.mark.parametrize("way", [way for way in WAYS if way not in MASK_ONLY])
def test_inputs_that_never_fire_have_no_weights_left_and_are_named(way) -> None:
    assert PROBLEM.prepared(way)["dead_I"].nonzero().flatten().tolist() == DEAD
    for asked in (HALF, TWO_OF_FOUR):
        for each in PROBLEM.solved(way, asked):
            assert (each.weight_RI[:, DEAD] == 0).all()


@pytest.mark.parametrize(
    ("way", "asked", "row", "last"),
    [  # of a row 1 to 96 the last that goes, from 0: of all, of all and one more, of a block of 40
        ("wanda", HALF, range(1, 97), 47),
        ("magnitude", HALF, range(1, 97), 48),
        ("magnitude seq", HALF, range(1, 97), 48),
        ("sparsegpt", HALF, range(1, 97), 20),
        ("wanda", TWO_OF_FOUR, [3, 1, 4, 2] * 24, 3),
        ("sparsegpt", TWO_OF_FOUR, [3, 1, 4, 2] * 24, 3),
    ],
)
def test_decisions_within_rounding_are_counted(way, asked, row, last) -> None:
    weight = torch.tensor([row], dtype=torch.float32)
    prepared = {
        "norm_I": torch.ones(96),
        "factor_II": torch.eye(96),
        "dead_I": torch.zeros(96, dtype=torch.bool),
    }
    found = PROBLEM.solved(way, asked, [weight], prepared)[0]
    assert found.close == 0 and found.weight_RI[0, last] == 0
    stays = weight.clone()
    above = int((weight[0] == weight[0, last] + 1).nonzero()[0])
    stays[0, above] = weight[0, last] * (1 + 2e-6)
    found = PROBLEM.solved(way, asked, [stays], prepared)[0]
    assert found.close == 1 and found.weight_RI[0, above] != 0
