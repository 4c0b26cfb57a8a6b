"""`sparsify`: what its flags ask for, what it refuses, and what lies beside the weights."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.pico import TEXT, assert_same, ok, refused, run, tensors
from tests.stages.test_nonfinite import broken

Models = Callable[[str], Path]
SAMPLES, SEQ = 4, 32
LINEARS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
MATRICES = [part for parts in LINEARS.values() for part in parts]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    words = [*TEXT.split(), *"abcdefghijklmnopqrstuvwxyz"]
    path.write_text(" ".join(random.Random(0).choices(words, k=1200)))
    return path


@pytest.fixture(scope="module")
def calib(text: Path) -> tuple[object, ...]:
    return ("--data", text, "--num-samples", SAMPLES, "--seq-length", SEQ)


def zeros(folder: Path) -> dict[str, float]:
    """Share of zeros of every matrix of the layers, by layer and linear: ``0 q_proj``."""
    return {
        f"{name.split('.')[2]} {name.split('.')[-2]}": float((x == 0).float().mean())
        for name, x in tensors(folder).items()
        if ".layers." in name and x.ndim == 2
    }


def sparse(source: Path, out: Path, *flags: object) -> dict[str, float]:
    ok("sparsify", "--load", source, "--save", out, "--to", "hf", *flags)
    return zeros(out)


MAGNITUDE = ("--method", "magnitude")


def test_all_linears_of_the_layers_and_nothing_else(models: Models, tmp_path: Path) -> None:
    found = sparse(models("all_bias"), tmp_path / "a", *MAGNITUDE, "--pattern", "1:4")
    assert set(found.values()) == {0.75} and len(found) == 4 * len(MATRICES)
    before, after = tensors(models("all_bias")), tensors(tmp_path / "a")
    rest = [name for name in before if ".layers." not in name or before[name].ndim == 1]
    assert_same({n: after[n] for n in rest}, {n: before[n] for n in rest})
    for name in before.keys() - set(rest):
        kept = after[name] != 0
        assert torch.equal(after[name][kept], before[name][kept]), name
        assert not torch.signbit(after[name][~kept]).any(), name


@pytest.mark.parametrize(
    ("flags", "wanted"),
    (
        (("--targets", "linear_qkv"), {"q_proj", "k_proj", "v_proj"}),
        (("--targets", "linear_k", "mlp"), {"k_proj", "gate_proj", "up_proj", "down_proj"}),
        (("--ignore", "linear_fc?"), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (
            ("--targets", "self_attention", "--ignore", "linear_proj"),
            {"q_proj", "k_proj", "v_proj"},
        ),
    ),
)
def test_linears_by_megatrons_names(
    models: Models, tmp_path: Path, flags: tuple[str, ...], wanted: set[str]
) -> None:
    found = sparse(models("gqa"), tmp_path / "a", *MAGNITUDE, "--pattern", "2:4", *flags)
    assert {name.split()[1] for name, share in found.items() if share} == wanted
    record = json.loads((tmp_path / "a/sparsity.json").read_text())
    assert len(record["tensors"]) == 4 * len(wanted)


def test_linears_of_some_layers(models: Models, tmp_path: Path) -> None:
    flags = ("--targets", "decoder.layers.[12].*", "--ignore", "decoder.layers.2.mlp.linear_fc1")
    found = sparse(models("gqa"), tmp_path / "a", *MAGNITUDE, "--pattern", "2:4", *flags)
    dense = {"2 gate_proj", "2 up_proj"} | {f"{n} {m}" for n in (0, 3) for m in MATRICES}
    assert {name for name, share in found.items() if not share} == dense


def test_a_pattern_on_some_layers_and_a_share_on_the_others(models: Models, tmp_path: Path) -> None:
    flags = ("--pattern", "2:8", "--pattern-layers", "0,2-3", "--sparsity", "0.25")
    found = sparse(models("gqa"), tmp_path / "a", *MAGNITUDE, *flags)
    for name, share in found.items():
        assert share == pytest.approx(0.25 if name.startswith("1 ") else 0.75, abs=3e-3)
    record = json.loads((tmp_path / "a/sparsity.json").read_text())
    patterns = {n.split(".")[2]: x.get("pattern") for n, x in record["tensors"].items()}
    assert patterns == {"0": "2:8", "1": None, "2": "2:8", "3": "2:8"}


def test_shares_of_layers_from_a_file_and_in_a_progression(models: Models, tmp_path: Path) -> None:
    shares = [0.3, 0.5, 0.9, 0.1]
    (tmp_path / "shares.yaml").write_text(yaml.safe_dump(shares))
    by_file = ("--sparsity-by-layer", tmp_path / "shares.yaml")
    found = sparse(models("gqa"), tmp_path / "a", *MAGNITUDE, *by_file)
    for name, share in found.items():
        assert share == pytest.approx(shares[int(name[0])], abs=3e-3)
    slope = ("--sparsity-by-layer", "arithmetic", "--sparsity-slope", 0.1, "--sparsity", 0.5)
    found = sparse(models("gqa"), tmp_path / "b", *MAGNITUDE, *slope)
    for name, share in found.items():
        assert share == pytest.approx(0.35 + 0.1 * int(name[0]), abs=3e-3)


def test_the_official_command_line_is_understood(
    models: Models, calib: tuple[Any, ...], tmp_path: Path
) -> None:
    data = ("--data", calib[1], "--nsamples", SAMPLES, "--seq-length", SEQ)
    for flags, ours in (
        (
            ("--prune_method", "ablate_mag_seq", "--sparsity_type", "2:4", "--sparsity_ratio", 0.5),
            ("--method", "magnitude", "--weight-update", "seq", "--pattern", "2:4"),
        ),
        (
            ("--prune_method", "wanda", "--sparsity_type", "unstructured", "--sparsity_ratio=0.6",
             "--use_variant"),
            ("--method", "wanda", "--sparsity", 0.6, "--variant"),
        ),
    ):  # fmt: skip
        names = [tmp_path / f"{flags[1]}-{who}" for who in "ab"]
        for out, words in zip(names, (flags, ours)):
            ok("sparsify", "--load", models("gqa"), "--save", out, "--to", "hf", *words, *data)
        assert_same(*map(tensors, names))


def test_documents_are_drawn_as_the_official_codes_do(models: Models, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from megatron_prune.data.windows import document_windows

    draws = random.Random(5)
    texts = [" ".join(draws.choices(TEXT.split(), k=n)) for n in (3, 40, 9, 80, 25)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenizer = AutoTokenizer.from_pretrained(models("gqa"))
    random.seed(7)
    wanted = []
    for _ in range(6):
        while True:
            ids = tokenizer(texts[random.randint(0, len(texts) - 1)]).input_ids
            if len(ids) > SEQ:
                break
        start = random.randint(0, len(ids) - SEQ - 1)
        wanted.append(ids[start : start + SEQ])
    about: Any = {"seq_length": SEQ, "seed": 7, "vocab_size": 379}
    found = document_windows(tmp_path / "d.jsonl", models("gqa"), count=6, **about)
    assert found.tolist() == wanted
    given = ("--data", tmp_path / "d.jsonl", "--seq-length", 500, "--num-samples", 2)
    how = ("--calibration-sampling", "documents", "--sparsity", 0.5, "--method", "wanda")
    load = ("--load", models("gqa"), "--save", tmp_path / "x", "--to", "hf")
    refused("sparsify", *load, *given[:2], "--seq-length", 120, *how, says="none of 5 documents")


BAD: tuple[tuple[tuple[object, ...], str], ...] = (
    (("--sparsity=0",), "'0': wanted a share of zeros above 0 and below 1"),
    (("--sparsity=nan",), "'nan'"),
    (("--sparsity=-0.5",), "'-0.5'"),
    ((), "neither --sparsity nor --pattern"),
    (("--pattern", "3:2"), "--pattern 3:2: wanted N:M"),
    (("--pattern", "4:4"), "--pattern 4:4"),
    (("--pattern", "a:b"), "--pattern a:b"),
    (("--pattern", "5:7"), "layers.0.self_attention.linear_q.weight has 48 inputs"),
    (("--pattern", "2:4", "--sparsity", "0.7"), "--pattern-layers"),
    (("--pattern", "2:4", "--sparsity", "0.7", "--pattern-layers", "4"), "no layer 4"),
    (("--sparsity", "0.7", "--pattern-layers", "3"), "needs both --pattern"),
    (("--sparsity", "0.5", "--variant"), "--variant with --method magnitude"),
    (("--pattern", "2:4", "--method", "wanda", "--variant"), "--variant with --pattern 2:4"),
    (("--sparsity", "0.5", "--sparsity-slope", "0.1"), "go together"),
    (("--sparsity", "0.5", "--owl-lambda", "0.1"), "needs --sparsity-by-layer owl"),
    (("--sparsity", "0.5", "--sparsity-by-layer", "nowhere.yaml"), "the file says each"),
    (("--sparsity-by-layer", "nowhere.yaml"), "no such file"),
    (("--sparsity", "0.5", "--targets", "linear_x"), "--targets linear_x: is no linear"),
    (("--sparsity", "0.5", "--ignore", "*"), "leave no linear"),
    (("--sparsity", "0.5", "--upstream-statistics"), "only wanda"),
    (("--sparsity", "0.5", "--refit"), "without --data"),
    (("--sparsity", "0.5", "--data", "README.md"), "nothing would use it"),
    (("--sparsity", "0.5", "--num-samples", "4"), "--num-samples with --method magnitude: nothing"),
    (("--sparsity", "0.5", "--calibration-sampling", "documents"), "--calibration-sampling with"),
    (("--sparsity", "0.5", "--true-sequential"), "--true-sequential with --method magnitude"),
    (("--sparsity", "0.5", "--damping", "1"), "--damping with --method magnitude"),
    (("--sparsity", "0.5", "--block-size", "8"), "--block-size with --method magnitude"),
    (
        ("--sparsity", "0.5", "--method", "alps", "--data", "README.md", "--block-size", "8"),
        "--block-size with --method alps",
    ),
    (
        ("--sparsity", "0.5", "--method", "wanda", "--data", "README.md", "--seed", "1"),
        "--seed 1: windows are the first of CALIB",
    ),
    (("--pattern", "2:3", "--sparsity", "0.33"), "leave --sparsity out, or say"),
    (("--sparsity", "0.5", "--distributed-timeout-minutes", "nan"), "'nan': wanted minutes"),
    (("--sparsity", "0.5", "--distributed-timeout-minutes=-1"), "'-1': wanted minutes"),
    (("--sparsity", "0.5", "--weight-update", "seq", "--damping=-1"), "--damping"),
    (("--sparsity", "0.5", "--seed", "1", "--method", "sideways"), "sideways"),
)


@pytest.mark.parametrize(("flags", "says"), BAD, ids=lambda x: " ".join(map(str, x))[:40])
def test_what_is_wrong_is_refused(
    models: Models, tmp_path: Path, flags: tuple[object, ...], says: str
) -> None:
    method = () if "--method" in flags else MAGNITUDE
    load = ("--load", models("gqa"), "--save", tmp_path / "x", "--to", "hf")
    refused("sparsify", *load, *method, *flags, says=says)
    assert not [*tmp_path.iterdir()]


def test_a_block_that_cuts_a_group_is_refused(
    models: Models, calib: tuple[Any, ...], tmp_path: Path
) -> None:
    load = ("--load", models("gqa"), "--save", tmp_path / "x", "--to", "hf", *calib)
    flags = ("--method", "sparsegpt", "--pattern", "2:4", "--block-size", 6)
    refused("sparsify", *load, *flags, says="--block-size 6: is no multiple of 4")


def test_a_sparser_model_is_refused_and_zeros_stay(
    models: Models, calib: tuple[Any, ...], tmp_path: Path
) -> None:
    sparse(models("gqa"), tmp_path / "a", *MAGNITUDE, "--pattern", "2:4")
    again = ("sparsify", "--load", tmp_path / "a", "--to", "hf")
    little = (*MAGNITUDE, "--sparsity", 0.3, "--save", tmp_path / "x")
    refused(*again, *little, says="q_proj.weight has 50.00% zeros already, more than the 30.00%")
    for flags in (
        ("--method", "sparsegpt", "--sparsity", 0.6),
        ("--method", "wanda", "--pattern", "1:4"),
    ):
        out = tmp_path / flags[1]
        ok(*again, "--save", out, *flags, *calib)
        before, after = tensors(tmp_path / "a"), tensors(out)
        for name in before:
            if "proj" in name:
                assert bool((after[name][before[name] == 0] == 0).all()), name
                assert float((after[name] == 0).float().mean()) > 0.55


def test_a_pattern_on_a_pruned_sparse_model_goes_over_its_uneven_zeros(
    models: Models, tmp_path: Path
) -> None:
    """What `prune` tells to do with a pattern that it broke."""
    sparse(models("gqa"), tmp_path / "a", *MAGNITUDE, "--pattern", "2:4")
    cut = ("--ffn-hidden-size-remain", 60, "--criterion", "random")
    ok("prune", "--load", tmp_path / "a", "--save", tmp_path / "p", "--to", "hf", *cut)
    assert max(zeros(tmp_path / "p").values()) > 0.502
    flags = ("--load", tmp_path / "p", "--save", tmp_path / "b", "--to", "hf", *MAGNITUDE)
    said = ok("sparsify", *flags, "--pattern", "2:4").err
    assert "% zeros where 50.00% were asked for" in said
    ok("verify", "--load", tmp_path / "b", "--source", tmp_path / "p")


def test_owls_shares_too_are_held_to_the_zeros_that_are_there(
    models: Models, calib: tuple[Any, ...], tmp_path: Path
) -> None:
    sparse(models("gqa"), tmp_path / "a", *MAGNITUDE, "--pattern", "1:4")
    flags = ("--method", "wanda", "--sparsity", 0.6, "--sparsity-by-layer", "owl", *calib)
    load = ("--load", tmp_path / "a", "--save", tmp_path / "x", "--to", "hf")
    refused("sparsify", *load, *flags, says="q_proj.weight has 75.00% zeros already, more than the")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_numbers_that_are_none_or_too_large_are_named(
    models: Models, calib: tuple[Any, ...], tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    for value, flags, says in (
        (float("nan"), (), "(1 NaN, 0 infinite); use another copy of the model"),
        (3e38, (), "a weight of 3e+38, more than 1e+15"),
        (1e5, ("--dtype", "fp16"), "finite in torch.float32; made into torch.float16, 1 of"),
    ):
        source = broken(models("gqa"), tmp_path / str(value), value, name=name)
        load = ("--load", source, "--save", tmp_path / "x", "--to", "hf", *calib, *flags)
        found = refused("sparsify", *load, "--sparsity", 0.5, says=says, code=3)
        assert name in found and "--allow-nonfinite" not in found
    assert not (tmp_path / "x").exists()


def test_activations_beyond_float32_name_the_matrix(
    models: Models, calib: tuple[Any, ...], tmp_path: Path
) -> None:
    """Weights of up to 1e13 in gate and up: their product has no square."""
    source = tmp_path / "m"
    shutil.copytree(models("gqa"), source)
    changed = tensors(source)
    for part in ("gate", "up"):
        changed[f"model.layers.1.mlp.{part}_proj.weight"] *= 1e13
    save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
    load = ("--load", source, "--save", tmp_path / "x", "--to", "hf", *calib, "--sparsity", 0.5)
    for method in ("wanda", "alps"):
        says = "what enters decoder.layers.1.mlp.linear_fc2.weight is not finite"
        refused("sparsify", *load, "--method", method, says=says, code=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_too_little_room_is_noticed_before_the_work(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model fits, the matrices that wait meanwhile do not."""
    size = sum(x.nbytes for x in tensors(models("gqa")).values())
    usage = shutil.disk_usage(tmp_path)._replace(free=size + 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    load = ("--load", models("gqa"), "--save", tmp_path / "x", "--to", "hf", *MAGNITUDE)
    done = run("sparsify", *load, "--sparsity", 0.5)
    assert done.code == 4 and "GB free" in done.err and "matrices at" not in done.err
    assert not [*tmp_path.iterdir()]


def test_true_sequential_sees_what_the_pruned_part_of_the_layer_makes(
    models: Models, calib: tuple[Any, ...], tmp_path: Path
) -> None:
    """Against a loop over transformers' modules."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags = ("--method", "wanda", "--sparsity", 0.5, "--true-sequential", *calib)
    sparse(models("gqa"), tmp_path / "a", *flags)
    model = AutoModelForCausalLM.from_pretrained(models("gqa"), dtype=torch.float64).eval()
    ids = AutoTokenizer.from_pretrained(models("gqa"))(
        calib[1].read_text(), add_special_tokens=False
    )["input_ids"]
    windows = torch.tensor(ids[: SAMPLES * SEQ]).view(SAMPLES, SEQ)
    for layer in model.model.layers:
        for parts in LINEARS.values():
            modules = [m for name, m in layer.named_modules() if name.split(".")[-1] in parts]
            seen: list[Tensor] = []
            hook = modules[0].register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            with torch.no_grad():
                model(windows)
            hook.remove()
            norms = seen[0].flatten(0, 1).square().sum(0).sqrt()
            for module in modules:
                metric = module.weight.data.abs() * norms
                out = metric.sort(dim=1, stable=True).indices[:, : metric.shape[1] // 2]
                module.weight.data.scatter_(1, out, 0.0)
    wanted, found = model.state_dict(), tensors(tmp_path / "a")
    for name in found:
        if "proj" in name:
            assert torch.equal(found[name] == 0, wanted[name] == 0), name


def test_dry_run_shows_and_writes_nothing(models: Models, tmp_path: Path) -> None:
    load = ("--load", models("gqa"), "--save", tmp_path / "x", "--to", "hf", "--dry-run")
    said = ok("sparsify", *load, *MAGNITUDE, "--pattern", "2:4").out
    assert "    3         7      2:4" in said and "would write" in said
    assert not [*tmp_path.iterdir()]


def test_after_prune_and_into_other_formats(
    models: Models, plans: Callable[[str], Path], calib: tuple[Any, ...], tmp_path: Path
) -> None:
    ok(
        "prune",
        "--load",
        models("gqa"),
        "--plan",
        plans("gqa"),
        "--to",
        "hf",
        "--save",
        tmp_path / "p",
    )
    flags = ("--method", "sparsegpt", "--sparsity", 0.5, *calib)
    one = sparse(tmp_path / "p", tmp_path / "a", *flags)
    assert (tmp_path / "a/plan.json").is_file()
    to = ("--to", "megatron", "--ckpt-format", "torch", "--dtype", "bf16")
    ok("sparsify", "--load", tmp_path / "p", "--save", tmp_path / "m", *to, *flags)
    ok("convert", "--load", tmp_path / "m", "--save", tmp_path / "b", "--to", "hf")
    assert zeros(tmp_path / "b") == one
    ok("verify", "--load", tmp_path / "b", "--source", tmp_path / "p")
