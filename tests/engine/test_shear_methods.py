"""``shear`` without noise and with frozen weights, in one process: steps, checkpoints, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.model.grid import ParallelGrid
from megatron_prune.store import open_source
from tests.engine.lora_runs import optimizer_keys, stored
from tests.engine.method_runs import (
    CUT,
    DETERMINISTIC,
    FROZEN,
    PROJECTED,
    SELF,
    PlainLoop,
    state,
    words,
)
from tests.engine.runs import batches, rows, told, weights
from tests.pico import ok, refused, tensors

Shear = Callable[..., Path]


@pytest.fixture
def shear(tmp_path: Path, reference: Path, corpus: Path) -> Shear:
    """``shear(save, *flags, load=...)`` runs and succeeds; returns the directory."""

    def once(save: str, *flags: object, load: object = None) -> Path:
        ok(*words(load or reference / "gqa", tmp_path / save, corpus, *CUT, *flags))
        return tmp_path / save

    return once


def test_steps_are_those_of_a_plain_torch_loop(shear: Shear, reference: Path, corpus: Path) -> None:
    """Transformers' model with gates multiplied into its weights, the paper's loss, AdamW."""
    from transformers import AutoModelForCausalLM

    flags = (*DETERMINISTIC, *FROZEN, "--sparsity-warmup-iters", 2, "--clip-grad", 0.5)
    still = shear(
        "still", *flags, "--lr", 0, "--min-lr", 0, "--exit-interval", 3, "--mask-lr", "1e-9"
    )
    save = shear("run", *flags, *SELF)
    model = AutoModelForCausalLM.from_pretrained(reference / "gqa", dtype=torch.float32)
    loop = PlainLoop(model.requires_grad_(False), state(still, 3)["parameters"], 6, 0.5, 2.0)
    logged = [row for row in rows(save) if "lm loss" in row]
    for number, (row, batch) in enumerate(zip(logged, batches(save, corpus), strict=True)):
        found = loop.step(batch, number, 2, row["learning-rate"] / 1e-3)
        for name in ("lm loss", "kl loss"):
            assert row[name] == pytest.approx(found[name], abs=1e-4), name
        assert row["grad-norm"] == pytest.approx(found["grad-norm"], rel=2e-3)
    masks = state(save)
    assert float((masks["parameters"] - loop.z.detach()).abs().max()) < 1e-3
    assert float((loop.z.detach() - state(still, 3)["parameters"]).abs().mean()) > 0.05
    assert len(masks["lambdas"]) == len(loop.lambdas)
    for found_row, wanted in zip(masks["lambdas"].tolist(), loop.lambdas):
        assert found_row == pytest.approx(wanted.tolist(), abs=1e-3)


@pytest.mark.parametrize("method", [DETERMINISTIC, PROJECTED, ()], ids=["det", "proj", "noise"])
def test_frozen_weights_are_those_of_the_source(
    shear: Shear, reference: Path, method: tuple[object, ...]
) -> None:
    """Bit for bit, and no optimizer state of any of them; a control: not so without the flag."""
    save, free = shear("run", *method, *FROZEN), shear("free", *method)
    source = open_source(reference / "gqa")
    found, other = weights(save), weights(free)
    assert all(torch.equal(found[name], source.read(name)) for name in found)
    assert not all(torch.equal(other[name], source.read(name)) for name in other)
    assert optimizer_keys(save, 6) == set()
    assert optimizer_keys(free, 6) != set()
    moved = state(save)["parameters"] - state(save, 3)["parameters"]
    assert float(moved.abs().max()) > 1e-4, "nothing was learned"


def test_frozen_weights_have_no_gradients_and_no_buffers(
    shear: Shear, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_prune.engine.train import loop

    wrapped: list[Any] = []
    original = loop.wrap_model

    def wrap(*given: Any) -> Any:
        wrapped.append(original(*given))
        return wrapped[-1]

    monkeypatch.setattr(loop, "wrap_model", wrap)
    shear("run", *DETERMINISTIC, *FROZEN, *SELF, "--bf16")
    shear("free", *DETERMINISTIC, "--bf16")
    frozen, free = wrapped
    assert not frozen.buffers and free.buffers
    parameters = list(frozen.parameters())
    assert all(p.grad is None and not hasattr(p, "main_grad") for p in parameters)
    assert not any(hasattr(p, "main_param") for p in parameters)
    assert all(hasattr(p, "main_param") for p in free.parameters())


def test_a_mask_of_exactly_the_target_is_what_is_exported(shear: Shear, tmp_path: Path) -> None:
    """Every logged step has the target's size, the plan is the last mask, and nothing is scaled:
    what is left of the weights has the bits of the source."""
    out = tmp_path / "pruned"
    save = shear("run", *PROJECTED, *FROZEN, "--mask-lr", 0.3, "--save-pruned", out,
                 "--hidden-size-remain", 40)  # fmt: skip
    for row in (row for row in rows(save) if "lm loss" in row):
        for word in ("hidden", "heads", "ffn", "layers"):
            assert row[f"expected sparsity {word}"] == pytest.approx(row[f"target sparsity {word}"])
        assert not [key for key in row if "lambda" in key]
    plan = open_source(save / "iter_0000006")
    found = tensors(out)
    assert found["model.layers.2.mlp.down_proj.weight"].shape == (40, 72)
    whole = plan.read("decoder.layers.0.mlp.linear_fc2.weight")
    values = set(whole.flatten().tolist())
    assert set(found["model.layers.0.mlp.down_proj.weight"].flatten().tolist()) <= values


@pytest.mark.parametrize(
    "flags",
    [(*DETERMINISTIC, *FROZEN, *SELF), DETERMINISTIC, PROJECTED],
    ids=["frozen", "det", "proj"],
)
def test_resume_is_bitwise(shear: Shear, flags: tuple[object, ...]) -> None:
    whole = shear("whole", *flags)
    shear("again", *flags, "--exit-interval", 3)
    again = shear("again", *flags)
    assert told(again) == told(whole)
    ours, theirs = state(again), state(whole)
    assert ours.keys() == theirs.keys()
    for which in ("parameters", "lambdas"):
        assert torch.equal(ours[which], theirs[which])
    ours_w, theirs_w = stored(again, 6), stored(whole, 6)
    assert all(torch.equal(ours_w[key], theirs_w[key]) for key in theirs_w)


def test_a_shut_hidden_channel_that_is_kept_can_be_exported(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    """Too many gates fall shut; the pruned model still computes what the gated one does."""
    out, flags = tmp_path / "pruned", ("--hidden-size-remain", 44, "--mask-method", "deterministic")
    fast = ("--mask-lr", 1, "--lagrangian-lr", 10, "--save-pruned", out, *FROZEN)
    done = ok(*words(reference / "gqa", tmp_path / "run", corpus, *flags, *fast))
    assert int((state(tmp_path / "run")["parameters"] <= 0).sum()) > 48 - 44
    gates = json.loads((out / "folding.json").read_text())["gates"]["hidden"]
    assert len(gates) == 44 and min(gates) == pytest.approx(1e-6)
    found = [line.split(": ")[1] for line in done.out.splitlines() if "loss of" in line]
    assert len(found) == 3 and found[1] == found[2] != found[0]
    assert "wanted the same but for rounding" not in done.err


def test_a_dry_run_counts_weights_alone(tmp_path: Path, reference: Path) -> None:
    from megatron_prune.engine.train import dry_run
    from megatron_prune.engine.train.shear_options import ShearOptions

    config = open_source(reference / "gqa").config
    options = ShearOptions(load=reference / "gqa", save=tmp_path, data_path=(), dtype="bf16")
    found = [dry_run._trained(options, config, ParallelGrid(), 1, x)[1] for x in (False, True)]
    count = dry_run.stage_parameters(config, ParallelGrid(), 0)
    assert found == [18 * count, 2 * count]


REFUSED = [
    ((*SELF,), "--freeze-weights too"),
    ((*FROZEN, "--distill-self", 0), "--distill-self is 0.0; wanted more than 0"),
    ((*FROZEN, *SELF, "--teacher", "{gqa}"), "--distill-self and --teacher"),
    ((*FROZEN, "--fp16"), "--freeze-weights and --fp16"),
    ((*FROZEN, "--lora-rank", 4), "--freeze-weights and --lora-rank"),
    ((*PROJECTED, "--lagrangian-lr", 1), "has no multipliers"),
    ((*PROJECTED, "--sparsity-warmup-iters", 2), "from the first step on"),
    ((*PROJECTED, "--start-sparsity", 0.1), "from the first step on"),
]


@pytest.mark.parametrize(("flags", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, reference: Path, corpus: Path, flags: tuple[object, ...], says: str
) -> None:
    given = [str(flag).format(gqa=reference / "gqa") for flag in flags]
    refused(*words(reference / "gqa", tmp_path / "run", corpus, *CUT, *given), says=says)
    assert not (tmp_path / "run").exists()


def test_a_budget_is_refused_for_masks_of_one_shape(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    given = (*PROJECTED, "--target-params", 50_000)
    refused(*words(reference / "gqa", tmp_path / "run", corpus, *given), says="give a shape")


def test_a_run_goes_on_as_it_began(shear: Shear, reference: Path, corpus: Path) -> None:
    """Frozen, or not; with the same method."""
    save = shear("run", *DETERMINISTIC, *FROZEN, "--exit-interval", 3)
    again = words(reference / "gqa", save, corpus, *CUT)
    refused(*again, *map(str, DETERMINISTIC), says="was trained with --freeze-weights")
    refused(*again, *map(str, (*PROJECTED, *FROZEN)), says="method deterministic")
