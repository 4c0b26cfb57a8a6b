"""``train --lora-rank`` in one process: steps, what is saved, how it is read, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.store import open_source
from tests.engine.domain_runs import domain_rows, make_corpora, write_recipe
from tests.engine.lora_runs import FLAGS, deltas, factors, make_sparse, optimizer_keys, stored
from tests.engine.runs import batches, losses, rows, told, words
from tests.engine.test_train_command import checkpoint_bytes
from tests.pico import assert_same, directory_bytes, ok, refused, tensors

Train = Callable[..., Path]
SCALE = 2.0  # of FLAGS


@pytest.fixture
def train(tmp_path: Path, reference: Path, corpus: Path) -> Train:
    """``train(save, *flags, load=...)`` runs and succeeds; returns the directory."""

    def once(save: str, *flags: object, load: object = None) -> Path:
        ok(*words(load or reference / "gqa", tmp_path / save, corpus, *flags))
        return tmp_path / save

    return once


def _validation(save: Path) -> list[float]:
    return [row["validation loss"] for row in rows(save) if "validation loss" in row]


def _hugging_face(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize(
    "more",
    [(), ("--lora-targets", "linear_qkv", "down_proj"), ("--lora-keep-zeros",)],
    ids=["all", "some", "zeros"],
)
def test_steps_are_those_of_a_plain_torch_loop(
    train: Train, tmp_path: Path, corpus: Path, more: tuple[str, ...]
) -> None:
    """Transformers' model with factors put in by hand: losses, norms and the factors themselves."""
    sparse, decay = make_sparse(tmp_path / "sparse"), ("--weight-decay", 0.5, "--clip-grad", 0.2)
    still = ("--lr", 0, "--min-lr", 0, "--exit-interval", 3)
    first = train("still", *FLAGS, *more, *still, load=sparse)
    save = train("run", *FLAGS, *more, *decay, load=sparse)
    trained = {k: x.clone().requires_grad_() for k, x in factors(stored(first, 3)).items()}
    model = _hugging_face(sparse).requires_grad_(False)
    fixed = dict(model.named_parameters())
    masks = {name: (x != 0) | ("--lora-keep-zeros" not in more) for name, x in fixed.items()}
    adam = torch.optim.AdamW(trained.values(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.5)
    for row, batch in zip([r for r in rows(save) if "lm loss" in r], batches(save, corpus)):
        adam.param_groups[0]["lr"] = row["learning-rate"]
        added = deltas(trained, SCALE)
        given = {n: x + masks[n] * added[n] if n in added else x for n, x in fixed.items()}
        tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        call = {"labels": targets, "shift_labels": targets}
        loss = torch.func.functional_call(model, given, (tokens,), call).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 0.2)
        adam.step()
        adam.zero_grad()
        assert row["lm loss"] == pytest.approx(float(loss), abs=1e-4)
        assert row["grad-norm"] == pytest.approx(float(norm), rel=1e-3)
    found = factors(stored(save, 6))
    assert set(found) == set(trained)
    assert all((found[key] - trained[key]).abs().max() < 1e-3 for key in trained)
    assert losses(save)[6] < losses(save)[1] - 0.05


def test_factors_begin_as_in_the_paper(train: Train) -> None:
    save = train("run", *FLAGS, "--lr", 0, "--min-lr", 0, "--exit-interval", 3)
    found = factors(stored(save, 3))
    assert len(found) == 8
    for key, x in found.items():
        if key.endswith("lora_B"):
            assert not x.any()
            continue
        bound = x.shape[-1] ** -0.5
        assert 0.97 * bound < x.abs().max() <= bound, key
        assert abs(float(x.mean())) < 0.1 * bound
        assert len({float(layer.sum()) for layer in x}) == 4, "layers begin alike"


def test_the_model_is_left_as_it_is_and_the_factors_lie_beside_it(
    train: Train, reference: Path
) -> None:
    whole, save = train("whole", "--lr", 0, "--min-lr", 0), train("run", *FLAGS)
    found = stored(save, 6)
    added = factors(found)
    assert_same({k: x for k, x in found.items() if k not in added}, stored(whole, 6))
    assert optimizer_keys(save, 6) == set(added)
    assert optimizer_keys(whole, 6) == set(stored(whole, 6))
    assert (save / "iter_0000006/hf/config.json").is_file()
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        common = torch.load(save / "iter_0000006/common.pt", weights_only=True)
    assert common["lora"]["rank"] == 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, reference: Path, corpus: Path) -> Path:
    """A finished run in fp32, of factors that matter."""
    save = tmp_path_factory.mktemp("lora") / "run"
    ok(*words(reference / "gqa", save, corpus, *FLAGS))
    return save


@pytest.fixture
def merged(run: Path, reference: Path) -> dict[str, torch.Tensor]:
    """The model of that run in Hugging Face's names, by plain indexing."""
    added = deltas(factors(stored(run, 6)), SCALE)
    base = tensors(reference / "gqa")
    assert all((added[name].abs() > 1e-3).float().mean() > 0.3 for name in added), "no factors"
    return {name: x + added[name] if name in added else x for name, x in base.items()}


def _assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    assert all((found[name] - wanted[name]).abs().max() < 1e-6 for name in wanted)


@pytest.mark.parametrize("format", ["torch_dist", "torch"])
def test_whatever_reads_it_reads_the_merged_model(
    run: Path, merged: dict[str, torch.Tensor], tmp_path: Path, format: str
) -> None:
    before = directory_bytes(run)
    ok("convert", "--load", run, "--save", tmp_path / "hf", "--to", "hf")
    _assert_close(tensors(tmp_path / "hf"), merged)
    layout = ("--tensor-model-parallel-size", 3, "--pipeline-model-parallel-size", 2)
    ok("reshard", "--load", run, "--save", tmp_path / "r", "--ckpt-format", format, *layout)
    ok("convert", "--load", tmp_path / "r", "--save", tmp_path / "again", "--to", "hf")
    assert_same(tensors(tmp_path / "again"), tensors(tmp_path / "hf"))
    assert "lora_rank" not in json.loads(ok("inspect", tmp_path / "r", "--json").out)
    ok("plan", "--load", run, "--save", tmp_path / "p.json", "--ffn-hidden-size-remain", 60)
    ok("prune", "--load", run, "--save", tmp_path / "p", "--plan", tmp_path / "p.json",
       "--to", "hf")  # fmt: skip
    ok("verify", "--load", tmp_path / "p", "--source", run, "--plan", tmp_path / "p.json")
    assert directory_bytes(run) == before


def test_part_reads_are_parts_of_whole_reads(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: `verify` compares them so."""
    from megatron_prune.store import lora

    monkeypatch.setattr(lora, "_BLOCK_ROWS", 20)  # two heads; blocks of several sizes
    source = open_source(run)
    sizes = {"linear_q": 6, "linear_k": 3, "linear_v": 3, "linear_proj": 6}
    sizes |= {"linear_gate": 96, "linear_up": 96, "linear_fc2": 96}
    for part, size in sizes.items():
        module = "self_attention" if size < 96 else "mlp"
        name = f"decoder.layers.2.{module}.{part}.weight"
        dim = int(part in ("linear_proj", "linear_fc2"))
        whole = source.read(name)
        for step in (1, 2, 3):
            parts = [source.read(name, at, at + step) for at in range(0, size, step)]
            assert torch.equal(torch.cat(parts, dim), whole)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [((), 1e-5), (("--bf16",), 2e-4)], ids=["fp32", "bf16"]
)
def test_the_merged_model_has_the_loss_of_the_one_in_training(
    train: Train, dtype: tuple[str, ...], tolerance: float
) -> None:
    save = train("run", *FLAGS, *dtype)
    still = ("--finetune", "--lr", 0, "--min-lr", 0, *dtype)
    again = train("again", *still, load=save)
    start = train("start", *still)
    last = _validation(save)[-1]
    assert _validation(again) == pytest.approx([last, last], abs=tolerance)
    assert _validation(start)[-1] > last + 0.05


def test_transformers_computes_the_same_loss_from_the_export(
    train: Train, corpus: Path, tmp_path: Path
) -> None:
    """The loss of step 4 from what is saved at 3, whole and exported."""
    save = train("run", *FLAGS)
    fourth = batches(save, corpus)[3]
    (tmp_path / "third").mkdir()
    (save / "iter_0000003").rename(tmp_path / "third/iter_0000003")
    ok(
        "convert",
        "--load",
        tmp_path / "third/iter_0000003",
        "--save",
        tmp_path / "hf",
        "--to",
        "hf",
    )
    targets = fourth[:, 1:].contiguous()
    with torch.no_grad():
        loss = _hugging_face(tmp_path / "hf")(
            fourth[:, :-1], labels=targets, shift_labels=targets
        ).loss
    assert losses(save)[4] == pytest.approx(float(loss), abs=1e-4)


def test_inspect_tells(run: Path) -> None:
    found = json.loads(ok("inspect", run, "--json").out)
    told = {name: value for name, value in found.items() if name.startswith("lora")}
    assert told == {
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "lora_targets": "linear_qkv linear_proj linear_fc1 linear_fc2",
        "lora_keep_zeros": False,
    }
    assert found["parameters"] == 119_760


def test_zeros_stay_zeros_only_when_asked(
    train: Train, reference: Path, tmp_path: Path, corpus: Path
) -> None:
    sparse = make_sparse(tmp_path / "sparse")
    values = tensors(sparse)
    zeros = {name: x == 0 for name, x in values.items()}
    for name, more in (("kept", ("--lora-keep-zeros",)), ("filled", ())):
        save = train(name, *FLAGS, *more, load=sparse)
        ok("convert", "--load", save, "--save", tmp_path / f"{name}-hf", "--to", "hf")
    kept, filled = tensors(tmp_path / "kept-hf"), tensors(tmp_path / "filled-hf")
    assert all(torch.equal(kept[name] == 0, zeros[name]) for name in zeros)
    assert all((filled[name][zeros[name]] != 0).all() for name in zeros if "proj" in name)
    assert all(not torch.equal(kept[name], values[name]) for name in zeros if "proj" in name)
    still = train("still", "--finetune", "--lr", 0, "--min-lr", 0, load=tmp_path / "kept")
    assert _validation(still)[-1] == pytest.approx(_validation(tmp_path / "kept")[-1], abs=1e-5)


@pytest.mark.parametrize(
    "flags",
    [(), ("--bf16", "--async-save"), ("--use-distributed-optimizer", "--lora-keep-zeros")],
    ids=lambda flags: "".join(flags) or "plain",
)
def test_resume_is_bitwise(train: Train, flags: tuple[str, ...]) -> None:
    whole = train("whole", *FLAGS, *flags)
    for _ in range(2):
        broken = train("broken", *FLAGS, *flags, "--exit-interval", 2, "--save-interval", 1)
    broken = train("broken", *FLAGS, *flags)
    assert told(broken) == told(whole)
    assert checkpoint_bytes(broken, 6) == checkpoint_bytes(whole, 6)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputing_changes_nothing(train: Train, granularity: str) -> None:
    full = ("--recompute-method", "uniform", "--recompute-num-layers", 1)
    how = ("--recompute-granularity", granularity, *(full if granularity == "full" else ()))
    plain, again = train("plain", *FLAGS), train("again", *FLAGS, *how)
    assert losses(again) == pytest.approx(losses(plain), abs=1e-6)
    ours, theirs = factors(stored(plain, 6)), factors(stored(again, 6))
    assert all((ours[key] - theirs[key]).abs().max() < 1e-5 for key in ours)


def test_it_starts_again_from_the_merged_weights(train: Train, run: Path) -> None:
    """``--finetune`` from a run with factors, with others: these are zero at the first step."""
    more = ("--lora-rank", 2, "--finetune", "--lora-targets", "linear_fc2")
    again = train("again", *more, load=run)
    still = train("still", "--finetune", "--lr", 0, "--min-lr", 0, load=run)
    assert losses(again)[1] == losses(still)[1]
    assert losses(again)[6] < losses(still)[6]
    assert {name: len(x.shape) for name, x in factors(stored(again, 6)).items()} == {
        "decoder.layers.mlp.linear_fc2.lora_A": 3,
        "decoder.layers.mlp.linear_fc2.lora_B": 3,
    }


def test_with_teacher_domains_and_guard(tmp_path: Path, reference: Path) -> None:
    make_corpora(tmp_path, reference / "gqa")
    recipe = write_recipe(tmp_path / "recipe.yaml", domain_rows(tmp_path))
    command = words(
        reference / "gqa", tmp_path / "run", "unused", *FLAGS, "--teacher", reference / "gqa",
        "--distill-lm-weight", 0.5, "--domains", recipe, "--domain-update-interval", 2,
        "--skip-nonfinite", 2, "--async-save", "--train-iters", 8,
    )  # fmt: skip
    at = command.index("--data-path")
    del command[at : at + 2]
    ok(*command)
    found = rows(tmp_path / "run")
    kl = [row["kl loss"] for row in found if "kl loss" in row]
    assert kl[0] == pytest.approx(0, abs=1e-6), "zero factors are not the model itself"
    assert kl[-1] > 1e-4


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--lora-alpha", 8), "--lora-alpha needs --lora-rank R"),
        (("--lora-targets", "linear_qkv"), "--lora-targets needs --lora-rank R"),
        (("--lora-keep-zeros",), "--lora-keep-zeros needs --lora-rank R"),
        (("--lora-rank", 0), "--lora-rank"),
        (("--lora-rank", 4, "--lora-alpha", 0), "--lora-alpha is 0; wanted more than 0"),
        (("--lora-rank", 49), "linear_qkv is 96 x 48, of rank 48 at most"),
        (("--lora-rank", 4, "--lora-targets", "q_proj"), "q_proj: is a part of linear_qkv"),
        (("--lora-rank", 4, "--lora-targets", "head"), "head: wanted some of linear_qkv"),
        (("--lora-rank", 4, "--init-random"), "--lora-rank and --init-random"),
        (
            ("--lora-rank", 4, "--transformer-impl", "transformer_engine"),
            "its linears have no factors; use local",
        ),
    ],
    ids=lambda value: "",
)
def test_refused_before_anything_is_written(
    tmp_path: Path, reference: Path, corpus: Path, flags: tuple[object, ...], says: str
) -> None:
    for more in ((), ("--dry-run",)):
        refused(*words(reference / "gqa", tmp_path / "run", corpus, *flags, *more), says=says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "other",
    [
        (),
        ("--lora-rank", 5, "--lora-alpha", 8),
        ("--lora-rank", 4, "--lora-alpha", 9),
        ("--lora-rank", 4, "--lora-alpha", 8, "--lora-targets", "linear_qkv"),
        ("--lora-rank", 4, "--lora-alpha", 8, "--lora-keep-zeros"),
    ],
    ids=lambda flags: "".join(map(str, flags[4:])) or str(len(flags)),
)
def test_other_factors_do_not_continue_a_run(
    run: Path, corpus: Path, reference: Path, tmp_path: Path, other: tuple[object, ...]
) -> None:
    says = "was saved with --lora-rank 4 --lora-alpha 8 --lora-targets linear_qkv linear_proj "
    for load, save in ((reference / "gqa", run), (run, tmp_path / "other")):
        for more in ((), ("--dry-run",)):
            message = refused(*words(load, save, corpus, *other, *more), says=says)
            wanted = " ".join(map(str, other[:4])) or "no --lora-rank"
            assert f"the flags say {wanted}" in message


def test_a_run_without_factors_does_not_continue_with_some(
    train: Train, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    save = train("run", "--exit-interval", 3)
    says = "was saved with no --lora-rank, the flags say --lora-rank 4"
    refused(*words(reference / "gqa", save, corpus, *FLAGS), says=says)


def test_a_dry_run_tells_what_is_trained(tmp_path: Path, reference: Path, corpus: Path) -> None:
    layout = ("--tensor-model-parallel-size", 3, "--pipeline-model-parallel-size", 2)
    flags = ("--lora-rank", 4, "--bf16", "--dry-run")
    done = ok(*words(reference / "gqa", tmp_path / "run", corpus, *flags, *layout))
    # a layer: 4 * ((48 + 96) + (48 + 48) + (48 + 192) + (96 + 48)) = 2496
    # a rank: 4 * ((48 + 32) + (16 + 48) + (48 + 64) + (32 + 48)) = 1344
    assert "trains 9,984 parameters, on the fullest rank 2,688" in done.out
    assert not (tmp_path / "run").exists()


# ---- damage --------------------------------------------------------------------------------------


def test_a_record_that_does_not_fit_the_factors_is_refused(run: Path, tmp_path: Path) -> None:
    import argparse
    import shutil

    copy = tmp_path / "iter_0000006"
    shutil.copytree(run / "iter_0000006", copy)
    (copy / "manifest.json").unlink()
    with torch.serialization.safe_globals([argparse.Namespace]):
        common = torch.load(copy / "common.pt", weights_only=True)
    record = common["lora"]
    for change, says in (
        ({"rank": 5}, "stored as (4, 4, 48), its factors of rank 5"),
        ({"targets": ["linear_qkv"]}, "its factors of rank 4 in linear_qkv make None"),
        ({"rank": "4"}, "wanted rank, alpha, targets, keep_zeros"),
        ({"alpha": float("inf")}, "--lora-alpha is inf"),
        ({"more": 1}, "wanted rank, alpha, targets, keep_zeros"),
        (None, "8 unexpected ['decoder.layers.mlp.linear_fc1.lora_A'"),
    ):
        damaged = {k: x for k, x in common.items() if k != "lora"}
        if change is not None:
            damaged["lora"] = {**record, **change}
        torch.save(damaged, copy / "common.pt")
        refused("inspect", copy, says=says, code=3)
