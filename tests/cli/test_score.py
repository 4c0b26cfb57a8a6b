"""`score`: what it refuses, what it adds to, and what `plan` makes of its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.errors import StorageError
from megatron_prune.planning.scores import load_scores, scores_bytes
from tests.pico import TEXT, ok, refused, write_tokenizer

Models = Callable[[str], Path]
SEQ, SAMPLES = 24, 4
SIZES = ("--seq-length", SEQ, "--num-samples", SAMPLES)
EVERY = (
    *("magnitude", "activation", "wanda", "flap", "residual-energy"),
    *("taylor", "fisher", "perplexity", "perplexity-greedy"),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT * 40)
    return path


@pytest.fixture(scope="module")
def scores(models: Models, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of gqa: activation (D, Q, F, L), residual-energy (D) and perplexity (L). Read only."""
    path = tmp_path_factory.mktemp("scores") / "gqa.safetensors"
    names = "hidden=residual-energy,heads=activation+2*residual-energy,layers=perplexity"
    given = ("--load", models("gqa"), "--data", text, *SIZES, "--save", path)
    ok("score", *given, "--criterion", names)
    return path


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says", "code"),
    [
        (("--criterion", "best"), "best is no criterion to score; wanted some of magnitude", 2),
        (("--criterion", "random"), "random is no criterion to score", 2),
        (("--criterion", ","), "--criterion ,: nothing is no criterion to score", 2),
        (("--seq-length", 200), "--seq-length 200 is more than the model's max_position", 2),
        (("--seq-length", 1), "--seq-length is 1; wanted 2 or more", 2),
        (("--data", "{short}"), " tokens, one window takes 24; give more text", 2),
        (("--data", "/nowhere"), "/nowhere", 2),
        (("--load", "/nowhere"), "/nowhere", 2),
        (
            ("--tokenizer-model", "{larger}", "--data", "{here}"),
            "larger gives token id 4",
            2,
        ),
        (("--save", "{folder}"), "is a directory; wanted a file", 2),
        (("--save", "/nowhere/x"), "/nowhere does not exist; make it first", 4),
        (("--tensor-model-parallel-size", 3), "1 processes do not make whole models", 2),
        (("--transformer-impl", "transformer_engine"), "use local", 2),
        (("--fp16", "--criterion", "wanda,taylor"), "--fp16 with --criterion taylor: the grad", 2),
        (("--removal-layers", 4), "--removal-layers 4: the model has 4 layers; wanted 1 to 3", 2),
        (("--save", "{load}/config.json"), "one of the inputs; they never change", 2),
        (("--save", "{load}/scores"), "one of the inputs; they never change", 2),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_scored_is_refused_and_leaves_nothing(
    flags: tuple[object, ...], says: str, code: int, models: Models, text: Path, tmp_path: Path
) -> None:
    short, larger = tmp_path / "short", tmp_path / "larger"
    short.write_text("too short.")
    if "{larger}" in flags:
        shutil.copytree(models("gqa"), larger)
        write_tokenizer(larger, 500)
    given = [
        str(x).format(
            short=short, larger=larger, folder=tmp_path, here=__file__, load=models("gqa")
        )
        for x in flags
    ]
    save = ("--criterion", "activation", "--save", tmp_path / "s")
    message = refused(
        "score", "--load", models("gqa"), "--data", text, *SIZES, *save, *given,
        says=says, code=code,
    )  # fmt: skip
    if "{larger}" in flags:
        assert "the model has a vocabulary of 379; name its own with --tokenizer-model" in message
    assert not (tmp_path / "s").exists()


def test_calibration_text_is_asked_for_by_every_criterion_but_magnitude(
    models: Models, tmp_path: Path
) -> None:
    for name in EVERY[1:]:
        given = ("score", "--load", models("gqa"), *SIZES, "--save", tmp_path / "s")
        refused(*given, "--criterion", f"magnitude,{name}", says=f"--data is missing: {name} look")
    ok(*given, "--criterion", "magnitude")
    assert set(load_scores(tmp_path / "s").criteria) == {"magnitude"}


@pytest.mark.parametrize("tensor", ["mlp.down_proj", "self_attn.k_proj"])
@pytest.mark.parametrize("criterion", EVERY)
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(
    criterion: str, tensor: str, models: Models, text: Path, tmp_path: Path
) -> None:
    file = shutil.copytree(models("gqa"), tmp_path / "m") / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.2.{tensor}.weight"][-1, -2] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    given = ("--load", tmp_path / "m", "--data", text, *SIZES, "--save", tmp_path / "s")
    message = refused("score", *given, "--criterion", criterion, says="not finite", code=3)
    ours = {
        "mlp.down_proj": "mlp.linear_fc2",
        "self_attn.k_proj": "self_attention.linear_qkv",  # fused with its neighbours when it runs
    }
    names = (f"model.layers.2.{tensor}.weight", f"decoder.layers.2.{ours[tensor]}.weight")
    assert any(name in message for name in names), message
    assert not (tmp_path / "s").exists()


def test_a_loss_that_overflows_is_told_with_its_layer(
    models: Models, text: Path, tmp_path: Path
) -> None:
    """Finite weights, too large together."""
    file = shutil.copytree(models("gqa"), tmp_path / "m") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].fill_(3e38)
    tensors["lm_head.weight"].mul_(1e3)
    save_file(tensors, file, metadata={"format": "pt"})
    given = ("score", "--load", tmp_path / "m", "--data", text, *SIZES, "--save", tmp_path / "s")
    for name in ("perplexity", "perplexity-greedy"):
        refused(*given, "--criterion", name, says="the loss without layer 0 is nan", code=3)
    assert not (tmp_path / "s").exists()


# ---- a file that is there already ----------------------------------------------------------------


def test_more_criteria_of_the_same_model_and_data_are_added(
    models: Models, text: Path, scores: Path, tmp_path: Path
) -> None:
    """What is there is not computed again: a mark put on it stays."""
    known = load_scores(scores)
    marked = {"activation": {axis: x + 1 for axis, x in known.criteria["activation"].items()}}
    save = tmp_path / "s"
    save.write_bytes(scores_bytes(type(known)(**{**vars(known), "criteria": marked})))
    given = ("score", "--load", models("gqa"), "--data", text, *SIZES, "--save", save)
    done = ok(*given, "--criterion", "activation,residual-energy")
    found = load_scores(save)
    assert set(found.criteria) == {"activation", "residual-energy"}
    for axis, x in marked["activation"].items():
        assert torch.equal(found.criteria["activation"][axis], x)
    assert "statistics" in done.err
    again = ok(*given, "--criterion", "activation,residual-energy")
    assert "statistics" not in again.err and "weights" not in again.err
    assert again.out == done.out


def test_a_finished_criterion_is_saved_before_the_next_fails(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_prune.engine.observe import score

    def fails(*_: object, **__: object) -> None:
        raise StorageError("the disk is gone")

    given = ("score", "--load", models("gqa"), "--data", text, *SIZES, "--save", tmp_path / "s")
    monkeypatch.setattr(score, "unit_gradients", fails)
    refused(*given, "--criterion", "taylor,activation,magnitude", says="the disk is gone", code=4)
    assert set(load_scores(tmp_path / "s").criteria) == {"activation", "magnitude"}
    monkeypatch.undo()
    done = ok(*given, "--criterion", "taylor,activation,magnitude")
    assert set(load_scores(tmp_path / "s").criteria) == {"activation", "magnitude", "taylor"}
    assert "gradients" in done.err and "statistics" not in done.err


def test_magnitude_goes_with_any_data(models: Models, text: Path, tmp_path: Path) -> None:
    """It saw none; the data of what is added becomes the file's."""
    given = ("score", "--load", models("gqa"), *SIZES, "--save", tmp_path / "s", "--criterion")
    ok(*given, "magnitude")
    assert load_scores(tmp_path / "s").provenance["tokens"] == 0
    ok(*given, "residual-energy", "--data", text)
    found = load_scores(tmp_path / "s")
    assert set(found.criteria) == {"magnitude", "residual-energy"}
    assert (found.provenance["tokens"], found.provenance["samples"]) == (SEQ * SAMPLES, SAMPLES)
    ok(*given, "magnitude")  # and back without any
    assert load_scores(tmp_path / "s").provenance == found.provenance


@pytest.mark.parametrize("what", ["other data", "another model"])
def test_scores_of_something_else_are_kept_without_overwrite(
    what: str, models: Models, text: Path, scores: Path, tmp_path: Path
) -> None:
    shutil.copy(scores, tmp_path / "s")
    kind, data = ("twin", text) if what == "another model" else ("gqa", tmp_path / "text")
    (tmp_path / "text").write_text("Other words. " * 60)
    given = ("--load", models(kind), "--data", data, *SIZES, "--save", tmp_path / "s")
    says = f"/s: holds scores of {what}; choose another file or use --overwrite"
    refused("score", *given, "--criterion", "activation", says=says)
    assert (tmp_path / "s").read_bytes() == scores.read_bytes()
    ok("score", *given, "--criterion", "residual-energy", "--overwrite")
    found = load_scores(tmp_path / "s")
    assert set(found.criteria) == {"residual-energy"}
    assert not torch.equal(
        found.criteria["residual-energy"]["D"], load_scores(scores).criteria["residual-energy"]["D"]
    )


def test_more_samples_are_other_data(
    models: Models, text: Path, scores: Path, tmp_path: Path
) -> None:
    shutil.copy(scores, tmp_path / "s")
    given = ("--load", models("gqa"), "--data", text, *SIZES, "--num-samples", SAMPLES + 1)
    save = ("--save", tmp_path / "s", "--criterion", "wanda")
    refused("score", *given, *save, says="holds scores of other data")


def test_another_dtype_is_not_mixed_in(
    models: Models, text: Path, scores: Path, tmp_path: Path
) -> None:
    shutil.copy(scores, tmp_path / "s")
    given = ("score", "--load", models("gqa"), "--data", text, *SIZES, "--save", tmp_path / "s")
    says = "holds scores of a model run in fp32, this run is bf16; choose another file or use"
    refused(*given, "--criterion", "wanda", "--bf16", says=says)
    assert (tmp_path / "s").read_bytes() == scores.read_bytes()
    ok(*given, "--criterion", "wanda", "--bf16", "--overwrite")
    assert load_scores(tmp_path / "s").provenance["dtype"] == "bf16"
    assert set(load_scores(tmp_path / "s").criteria) == {"wanda"}


def test_other_removals_are_not_mixed_in(
    models: Models, text: Path, scores: Path, tmp_path: Path
) -> None:
    """Where removals are in the file and asked for; other criteria do not look at them."""
    shutil.copy(scores, tmp_path / "s")
    assert load_scores(scores).provenance["removal_samples"] == SAMPLES  # as many as there are
    given = ("score", "--load", models("gqa"), "--data", text, *SIZES, "--save", tmp_path / "s")
    says = "holds scores of --removal-samples 4, this run's is 2; choose another file or use"
    for name in ("perplexity", "perplexity-greedy"):
        refused(*given, "--removal-samples", 2, "--criterion", name, says=says)
    ok(*given, "--removal-samples", 2, "--criterion", "residual-energy")
    ok(*given, "--removal-samples", SAMPLES + 1, "--criterion", "perplexity-greedy")
    assert load_scores(tmp_path / "s").provenance["removal_layers"] == 1
    says = "holds scores of --removal-layers 1, this run's is 2"
    refused(*given, "--removal-layers", 2, "--criterion", "perplexity-greedy", says=says)


def test_without_seq_length_it_is_what_the_model_takes(
    models: Models, text: Path, tmp_path: Path
) -> None:
    samples, save = ("--num-samples", SAMPLES), ("--save", tmp_path / "s", "--overwrite")
    for kind, takes in (("gqa", 128), ("mistral", 64)):  # its positions, its window
        given = ("score", "--load", models(kind), *samples, *save, "--criterion")
        done = ok(*given, "residual-energy", "--data", text)
        assert load_scores(tmp_path / "s").provenance["seq_length"] == takes
        assert f"--seq-length {takes}: as much as the model takes" in done.err
        assert "--seq-length" not in ok(*given, "magnitude").err  # which looks at no text


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_file_that_holds_no_scores_is_kept(
    flags: tuple[str, ...], models: Models, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "s").write_text("dear diary, this is longer than eight bytes")
    given = ("--load", models("gqa"), "--data", text, *SIZES, "--save", tmp_path / "s")
    name = ("--criterion", "residual-energy")
    message = refused("score", *given, *name, *flags, says="not a scores file")
    assert "remove it, or choose another file" in message
    assert (tmp_path / "s").read_text().startswith("dear diary")


def test_a_file_without_a_count_of_tokens_is_added_to(models: Models, tmp_path: Path) -> None:
    given = ("score", "--load", models("gqa"), *SIZES, "--save", tmp_path / "s")
    given = (*given, "--criterion", "magnitude")
    ok(*given)
    known = load_scores(tmp_path / "s")
    bare = type(known)(**{**vars(known), "provenance": {}})
    (tmp_path / "s").write_bytes(scores_bytes(bare))
    assert ok(*given).err.endswith("0 calibration tokens\n")


def test_the_input_formats_give_the_same_scores(
    models: Models, shards: Callable[..., Path], text: Path, tmp_path: Path, scores: Path
) -> None:
    given = ("--data", text, *SIZES, "--criterion", "activation,residual-energy,perplexity")
    own = ("--tokenizer-model", models("gqa"))
    source = shards("gqa", "torch_dist", 3, 1)
    ok("score", "--load", source, *given, *own, "--save", tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == scores.read_bytes()


# ---- plan ----------------------------------------------------------------------------------------


def _plan(models: Models, tmp_path: Path, *flags: object) -> dict[str, object]:
    ok("plan", "--load", models("gqa"), "--save", tmp_path / "p.json", "--overwrite", *flags)
    return json.loads((tmp_path / "p.json").read_text())


def test_a_plan_keeps_the_highest_scored(models: Models, scores: Path, tmp_path: Path) -> None:
    given = ("--scores", scores, "--criterion", "activation", "--balance-for", 3)
    targets = ("--hidden-size-remain", 30, "--ffn-hidden-size-remain", 60)
    plan = _plan(models, tmp_path, *given, *targets, "--num-attention-heads-remain", 3)
    kept, found = plan["kept"], load_scores(scores).criteria["activation"]
    best = sorted(range(48), key=lambda unit: -float(found["D"][unit]))
    assert kept["hidden"] == sorted(best[:30])
    for layer in range(4):
        ffn = []
        for first in (0, 32, 64):  # as many on each of three ranks
            part = range(first, first + 32)
            ffn += sorted(part, key=lambda unit: -float(found["F"][layer, unit]))[:20]
        assert kept["ffn"][str(layer)] == sorted(ffn)
        pairs = [(0, 1), (2, 3), (4, 5)]  # the heads of each group
        heads = [max(pair, key=lambda head: float(found["Q"][layer, head])) for pair in pairs]
        assert kept["heads"][str(layer)] == heads
    assert plan["criterion"] == "activation"


@pytest.mark.parametrize("criterion", ["perplexity", "activation"])
@pytest.mark.parametrize("remain", [1, 2, 3])
def test_num_layers_remain_drops_the_lowest_scored(
    remain: int, criterion: str, models: Models, scores: Path, tmp_path: Path
) -> None:
    given = ("--scores", scores, "--criterion", criterion, "--num-layers-remain", remain)
    found = load_scores(scores).criteria[criterion]["L"].tolist()
    lowest = sorted(range(4), key=lambda layer: found[layer])[: 4 - remain]
    wanted = sorted(set(range(4)) - set(lowest))
    plan = _plan(models, tmp_path, *given)
    assert plan["kept"]["layers"] == wanted
    assert plan["target"]["num_layers"] == remain


def test_all_layers_remain_when_as_many_are_asked_for(
    models: Models, scores: Path, tmp_path: Path
) -> None:
    given = ("--scores", scores, "--criterion", "activation", "--num-layers-remain", 4)
    assert _plan(models, tmp_path, *given)["kept"]["layers"] is None


def test_a_criterion_for_each_axis(models: Models, scores: Path, tmp_path: Path) -> None:
    targets = ("--hidden-size-remain", 30, "--num-attention-heads-remain", 3)
    given = (*targets, "--num-layers-remain", 2, "--scores", scores, "--criterion")
    kept = _plan(models, tmp_path, *given, "hidden=residual-energy,activation,layers=perplexity")
    energy, activation = (
        _plan(models, tmp_path, *targets[: 2 * n], "--scores", scores, "--criterion", name)["kept"]
        for name, n in (("residual-energy", 1), ("activation", 2))
    )
    assert kept["kept"]["hidden"] == energy["hidden"] != activation["hidden"]
    for layer in kept["kept"]["layers"]:
        assert kept["kept"]["heads"][str(layer)] == activation["heads"][str(layer)]


HIDDEN = ("--hidden-size-remain", 30)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--criterion", "activation"), "--criterion activation: without --scores only random"),
        (("--scores", "{scores}"), "--scores with --criterion random, which needs none; name one"),
        (("--scores", "/nowhere", "--criterion", "wanda"), "--scores /nowhere: is not there; make"),
        (
            ("--scores", "{scores}", "--criterion", "wanda"),
            "--criterion wanda: not in the scores, which hold activation, perplexity, residual-ene",
        ),
        (
            ("--scores", "{scores}", "--criterion", "perplexity"),
            "perplexity does not score hidden; those in the file that do: activation, residual-en",
        ),
        (
            ("--scores", "{scores}", "--criterion", "activation", "--load", "{twin}"),
            ": of another model (",
        ),
        (
            ("--num-layers-remain", 2, "--drop-layers", "1"),
            "--num-layers-remain and --drop-layers: give one of the two",
        ),
        (("--num-layers-remain", 0), "--num-layers-remain 0: the model has 4; wanted 1 to 4"),
        (("--num-layers-remain", 5), "--num-layers-remain 5: the model has 4; wanted 1 to 4"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_planned_by_scores_is_refused(
    flags: tuple[object, ...], says: str, models: Models, scores: Path, tmp_path: Path
) -> None:
    given = [str(x).format(scores=scores, twin=models("twin")) for x in flags]
    save = ("--save", tmp_path / "p")
    message = refused("plan", "--load", models("gqa"), *save, *HIDDEN, *given, says=says)
    if "{twin}" in flags:
        digest = load_scores(scores).source_digest[:12]
        assert digest in message and f"score {models('twin')}" in message
    assert list(tmp_path.iterdir()) == []


def test_decisions_within_rounding_are_told(models: Models, scores: Path, tmp_path: Path) -> None:
    """By `plan` and by `prune` that makes its own; nothing of it when all is clear, or random."""
    known = load_scores(scores)
    found = {axis: x.clone() for axis, x in known.criteria["activation"].items()}
    order = found["D"].sort(descending=True).indices.tolist()
    found["D"][order[30]] = found["D"][order[29]]
    tied = tmp_path / "tied"
    tied.write_bytes(
        scores_bytes(type(known)(**{**vars(known), "criteria": {"activation": found}}))
    )
    load = ("--load", models("gqa"), *HIDDEN, "--criterion", "activation", "--scores")
    prune = ("prune", "--save", tmp_path / "m", "--to", "hf", "--dry-run")
    for command in (("plan", "--save", tmp_path / "p", "--overwrite"), prune):
        err = ok(*command, *load, tied).err
        kept, dropped = sorted(order[29:31])
        assert "warning: 1 of 1 decisions are within rounding" in err
        assert f": hidden: {kept} over {dropped}\n" in err
        assert "rounding" not in ok(*command, *load, scores).err
        random = ok(*command, "--load", models("gqa"), *HIDDEN)
        assert "rounding" not in random.err
    named = ("--load", models("gqa"), "--drop-layers", 1, "--criterion", "activation")
    flat = {axis: x * 0 + 1 for axis, x in found.items()}
    tied.write_bytes(scores_bytes(type(known)(**{**vars(known), "criteria": {"activation": flat}})))
    assert "rounding" not in ok("plan", "--save", tmp_path / "q", *named, "--scores", tied).err


def test_damaged_scores_are_refused_with_exit_3(
    models: Models, scores: Path, tmp_path: Path
) -> None:
    (tmp_path / "s").write_bytes(scores.read_bytes()[:-9])
    given = ("--load", models("gqa"), "--save", tmp_path / "p", *HIDDEN)
    more = ("--scores", tmp_path / "s", "--criterion", "activation")
    refused("plan", *given, *more, says=f"{tmp_path}/s: not a scores file", code=3)
