"""``train`` in one process: it learns, tells, saves, and continues to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prune.data.tokenizers import load_tokenizer
from tests.engine.runs import batches, losses, rows, told, weights, words
from tests.engine.wrong_steps import wrong_steps
from tests.launch import made_once
from tests.pico import directory_bytes, make_model, ok, refused, run

Train = Callable[..., Path]


RAMP = ("--rampup-batch-size", 1, 1, 9, "--micro-batch-size", 1)


@pytest.fixture
def train(tmp_path: Path, reference: Path, corpus: Path) -> Train:
    """``train(save, *flags, load=...)`` runs and succeeds; returns the directory."""

    def once(save: str, *flags: object, load: object = None) -> Path:
        ok(*words(load or reference / "gqa", tmp_path / save, corpus, *flags))
        return tmp_path / save

    return once


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, reference: Path, corpus: Path) -> Path:
    """The short run without more flags; to be read only."""
    with made_once(tmp_path_factory, "train-whole") as (folder, fresh):
        if fresh:
            ok(*words(reference / "gqa", folder / "run", corpus))
    return folder / "run"


@pytest.fixture(scope="module")
def first_half(tmp_path_factory: pytest.TempPathFactory, reference: Path, corpus: Path) -> Path:
    """Three steps of it; to be read only."""
    with made_once(tmp_path_factory, "train-half") as (folder, fresh):
        if fresh:
            ok(*words(reference / "gqa", folder / "run", corpus, "--exit-interval", 3))
    return folder / "run"


@pytest.fixture
def half(first_half: Path, tmp_path: Path) -> Path:
    """A copy of it, to be continued."""
    return shutil.copytree(first_half, tmp_path / "run")


def checkpoint_bytes(save: Path, iteration: int) -> dict[str, str]:
    """The weights and the optimizer's state as they lie on disk."""
    found = directory_bytes(save / f"iter_{iteration:07d}")
    return {name: digest for name, digest in found.items() if name.endswith(".distcp")}


def test_a_run_learns_tells_and_saves(train: Train, reference: Path, corpus: Path) -> None:
    before = directory_bytes(reference / "gqa"), directory_bytes(corpus.parent)
    save = train("run")
    assert (directory_bytes(reference / "gqa"), directory_bytes(corpus.parent)) == before
    found = losses(save)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found[6] < found[1] - 0.05
    first, validation = rows(save)[0], [row for row in rows(save) if "validation loss" in row]
    assert {"iteration", "lm loss", "learning-rate", "grad-norm", "consumed-samples"} <= set(first)
    assert [row["iteration"] for row in validation] == [3, 6]
    assert all("lm loss" not in row for row in validation)
    assert validation[1]["validation loss"] < validation[0]["validation loss"]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "6"
    for name in ("iter_0000003", "iter_0000006"):
        kept = {path.name for path in (save / name).iterdir()}
        assert {"hf", "manifest.json", ".metadata", "common.pt", "metadata.json"} <= kept
    digests = [load_tokenizer(path).digest for path in (save, reference / "gqa")]
    assert digests[0] == digests[1], "the checkpoint does not carry its tokenizer"


def test_steps_are_those_of_a_plain_torch_loop(train: Train, reference: Path, corpus: Path) -> None:
    """Transformers' model, torch's AdamW and clipping, on the same samples: losses and norms."""
    from transformers import AutoModelForCausalLM

    flags = ("--weight-decay", 0.5, "--clip-grad", 0.7, "--adam-beta2", 0.9, "--lr", "1e-2")
    save = train("run", *flags, "--micro-batch-size", 2)
    model = AutoModelForCausalLM.from_pretrained(reference / "gqa", dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.9), eps=1e-8)
    for row, batch in zip([r for r in rows(save) if "lm loss" in r], batches(save, corpus)):
        for group in adam.param_groups:
            group["lr"] = row["learning-rate"]
        tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        loss = model(tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        adam.step()
        adam.zero_grad()
        assert row["lm loss"] == pytest.approx(float(loss), abs=1e-4)
        assert row["grad-norm"] == pytest.approx(float(norm), rel=1e-3)


def test_tensorboard_has_megatrons_names(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    wanted = {"lm loss", "learning-rate", "grad-norm", "batch-size", "lm loss validation"}
    assert wanted <= set(board.Tags()["scalars"])
    assert {e.step: e.value for e in board.Scalars("lm loss")} == pytest.approx(losses(whole))


@pytest.mark.parametrize(
    "flags",
    [
        (),
        pytest.param(("--bf16",), marks=pytest.mark.slow),
        ("--fp16", "--initial-loss-scale", 1024),
        ("--use-distributed-optimizer",),
        RAMP,
        ("--log-interval", 4),
        pytest.param(("--init-random",), marks=pytest.mark.slow),
        pytest.param(("--recompute-granularity", "selective"), marks=pytest.mark.slow),
    ],
    ids=lambda flags: " ".join(map(str, flags)) or "plain",
)
def test_resume_is_bitwise(train: Train, flags: tuple[object, ...]) -> None:
    whole = train("whole", *flags)
    for _ in range(2):
        broken = train("broken", *flags, "--exit-interval", 2, "--save-interval", 1)
    assert max(int(p.name[5:]) for p in broken.glob("iter_*")) == 4
    broken = train("broken", *flags)
    assert told(broken) == told(whole)
    assert checkpoint_bytes(broken, 6) == checkpoint_bytes(whole, 6)


def test_loading_what_is_saved_into_another_directory_continues_it(
    train: Train, whole: Path, first_half: Path
) -> None:
    other = train("other", load=first_half)
    assert losses(other) == {n: x for n, x in losses(whole).items() if n > 3}
    again = train("again", "--finetune", load=first_half)
    assert list(losses(again)) == [1, 2, 3, 4, 5, 6]
    assert losses(again)[1] != losses(whole)[1], "--finetune does not start with the saved weights"
    fresh = train("fresh", "--no-load-optim", load=first_half)
    assert losses(fresh)[4] == losses(whole)[4]
    assert losses(fresh)[6] != losses(whole)[6], "--no-load-optim loaded the optimizer"


def test_a_finished_run_is_left_alone(train: Train) -> None:
    save = train("run")
    before = directory_bytes(save / "iter_0000006"), rows(save)
    train("run")
    assert (directory_bytes(save / "iter_0000006"), rows(save)) == before


def test_keep_last_keeps_the_newest(train: Train) -> None:
    save = train("run", "--save-interval", 1, "--keep-last", 2)
    assert sorted(p.name for p in save.glob("*iter_*")) == ["iter_0000005", "iter_0000006"]


@pytest.mark.parametrize("tracker", ["", "garbage\0", "99", "3\n4", None], ids=repr)
def test_a_bad_tracker_falls_back_to_the_newest(
    whole: Path, half: Path, reference: Path, corpus: Path, tracker: str | None
) -> None:
    file = half / "latest_checkpointed_iteration.txt"
    file.unlink() if tracker is None else file.write_text(tracker)
    done = ok(*words(reference / "gqa", half, corpus))
    assert "iter_0000003" in done.err and "continuing" in done.err
    assert told(half) == told(whole)
    assert file.read_text() == "6"


def test_a_cut_checkpoint_falls_back_to_the_one_before(
    train: Train, whole: Path, reference: Path, corpus: Path
) -> None:
    save = train("run", "--save-interval", 2, "--exit-interval", 4)
    cut = next((save / "iter_0000004").glob("*.distcp"))
    cut.write_bytes(cut.read_bytes()[:-1])
    done = ok(*words(reference / "gqa", save, corpus))
    assert "iter_0000002" in done.err
    assert losses(save) == losses(whole)


def test_leftovers_of_a_killed_save_are_swept(train: Train, half: Path) -> None:
    save = half
    (save / ".iter_0000005.tmp.0badc0de").mkdir()
    (save / ".iter_0000005.tmp.0badc0de" / "__0_0.distcp").write_bytes(b"half")
    with open(save / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "lm loss": 1.0}\n{"iteration": 5, "lm lo')
    save = train("run")
    assert sorted(p.name for p in save.iterdir() if p.name.startswith(".")) == [".cache"]
    assert list(losses(save)) == [1, 2, 3, 4, 5, 6]
    assert losses(save)[4] != 1.0


def test_an_index_that_a_kill_has_cut_short_is_built_again(
    whole: Path, half: Path, reference: Path, corpus: Path
) -> None:
    indices = sorted((half / ".cache").glob("*_index.npy"))
    indices[0].write_bytes(indices[0].read_bytes()[:-3])
    indices[1].write_bytes(b"")
    np.save(indices[2], np.array([{}], dtype=object))  # would be opened by pickle
    done = ok(*words(reference / "gqa", half, corpus))
    assert done.err.count("built again") == 3
    assert losses(half) == losses(whole)


def test_a_ramp_takes_the_samples_it_says(train: Train) -> None:
    save = train("run", *RAMP)
    found = [(row["batch-size"], row["consumed-samples"]) for row in rows(save) if "lm loss" in row]
    assert found == [(1, 1), (1, 2), (1, 3), (2, 5), (2, 7), (3, 10)]
    # cosine from 1e-3 to 1e-4 over samples 2 to 10, at sample 7
    assert rows(save)[-2]["learning-rate"] == pytest.approx(3.778e-4, abs=1e-7)


def test_blends_follow_the_weights(tmp_path: Path, reference: Path) -> None:
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.engine.train.corpora import build_datasets, check_corpora
    from megatron_prune.engine.train.options import TrainOptions
    from megatron_prune.model.grid import ParallelGrid

    for name, letter in (("a", "the "), ("b", "dog ")):
        text = json.dumps({"text": letter * 400})
        (tmp_path / f"{name}.jsonl").write_text("\n".join([text] * 6))
        ok(
            "preprocess", "--input", tmp_path / f"{name}.jsonl", "--json-key", "text",
            "--tokenizer-model", reference / "gqa", "--output-prefix", tmp_path / name,
        )  # fmt: skip
    a, b = (str(tmp_path / f"{name}_text_document") for name in "ab")
    options = TrainOptions(
        load=None, save=tmp_path / "run", data_path=("3", a, "1", b), train_iters=400, lr=0,
        micro_batch_size=1, seq_length=16, split="100,0,0", eval_iters=0,
    )  # fmt: skip
    with model_parallel(ParallelGrid()):
        facts = check_corpora(options, reference / "gqa", 379)
        data, none = build_datasets(options, facts, (400, 0), 379)
        assert none is None
        tokenizer = load_tokenizer(reference / "gqa")
        share = sum("the" in tokenizer.decode(data[i]["tokens"].tolist()) for i in range(400)) / 400
    assert share == pytest.approx(0.75, abs=0.01)
    assert not list(tmp_path.glob("*/cache")), "an index was written beside the corpora"


# ---- what stops a run ----------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_before_anything_is_saved(
    tmp_path: Path, corpus: Path
) -> None:
    model = make_model(tmp_path / "model", "gqa")
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    refused(*words(model, tmp_path / "run", corpus), says="iteration 1: lm loss is nan", code=3)
    assert not list((tmp_path / "run").glob("iter_*"))


def test_weights_that_are_no_numbers_are_not_saved(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    save = tmp_path / "run"
    flags = ("--lr", "1e38", "--lr-warmup-iters", 0, "--save-interval", 1, "--clip-grad", 0)
    says = "parameters hold values that are not finite"
    refused(*words(reference / "gqa", save, corpus, *flags), says=says, code=3)
    assert not list(save.glob("iter_*"))


def test_gradients_that_are_no_numbers_stop_before_they_are_applied(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    save = tmp_path / "run"
    command = words(reference / "gqa", save, corpus, "--save-interval", 1)
    with wrong_steps({4: "gradient"}):
        refused(*command, says="iteration 4: gradient", code=3)
    assert sorted(p.name for p in save.glob("iter_*"))[-1] == "iter_0000003"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--data-path", "/nowhere/x"), "/nowhere/x"),
        (("--data-path", "0.5", "{corpus}", "{corpus}"), "weight and prefix in turns"),
        (("--data-path", "-1", "{corpus}"), "more than 0"),
        (("--global-batch-size", 3, "--micro-batch-size", 2), "multiple of --micro-batch-size 2"),
        (("--seq-length", 1), "--seq-length is 1"),
        (("--seq-length", 500), "max_position_embeddings 128"),
        (("--seq-length", 120, "--split", "98,2,0"), "one sample takes 121"),
        (("--split", "0,1,0"), "nothing to train on"),
        (("--split", "a,b"), "such as 99,1,0"),
        (("--split", "1,0,0"), "no validation part"),
        (("--lr", "nan"), "--lr is nan"),
        (("--lr", "1e-5"), "below --min-lr"),
        (("--lr-decay-style", "steep"), "inverse-square-root"),
        (("--lr-warmup-iters", 6), "not below the 6 steps"),
        (("--adam-beta2", 1), "wanted 0 <= beta < 1"),
        (("--eval-iters", -1), "--eval-iters is -1"),
        (("--recompute-granularity", "full"), "--recompute-method"),
        (("--rampup-batch-size", 1, 2, 9), "whole steps of the increment"),
        (("--tensor-model-parallel-size", 3), "1 processes do not make whole models"),
        (("--tokenizer-model", "{other}"), "another"),
        (("--load", "/nowhere"), "/nowhere"),
        (("--transformer-impl", "transformer_engine"), "transformer_engine"),
        (("--context-parallel-size", 2), "context-parallel-size 2 = 2; start a multiple of 2"),
        (("--context-parallel-size", 3), "--seq-length 32 is not a multiple of 6; use 30"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_refused_before_anything_is_written(
    tmp_path: Path, reference: Path, corpus: Path, flags: tuple[object, ...], says: str
) -> None:
    other = tmp_path / "other"
    if "{other}" in flags:
        make_model(other, "gqa", vocab_size=400)
        from tests.pico import write_tokenizer

        write_tokenizer(other, 300)
    filled = [str(flag).format(corpus=corpus, other=other) for flag in flags]
    refused(*words(reference / "gqa", tmp_path / "run", corpus, *filled), says=says)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_no_run_is_refused(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    refused(*words(reference / "gqa", tmp_path / "mine", corpus), says="thesis.tex")
    model = tmp_path / "model"
    ok("convert", "--load", reference / "gqa", "--save", model, "--to", "megatron")
    before = directory_bytes(model)
    refused(*words(model, model, corpus), says="without training state")
    assert directory_bytes(model) == before


def test_another_schedule_is_refused_unless_told_which_wins(
    half: Path, reference: Path, corpus: Path
) -> None:
    save = half
    longer = words(reference / "gqa", save, corpus, "--train-iters", 8)
    refused(*longer, says="lr_decay_steps 24 -> 32")
    assert list(losses(save)) == [1, 2, 3]
    shutil.copytree(save, save.parent / "kept")
    ok(*longer, "--override-opt-param-scheduler")
    ok(*words(reference / "gqa", save.parent / "kept", corpus), "--train-iters", 8,
       "--use-checkpoint-opt-param-scheduler")  # fmt: skip
    assert list(losses(save)) == list(losses(save.parent / "kept")) == list(range(1, 9))
    assert rows(save)[-2]["learning-rate"] != rows(save.parent / "kept")[-2]["learning-rate"]


def test_another_kind_of_optimizer_state_is_refused(
    half: Path, reference: Path, corpus: Path
) -> None:
    save = half
    refused(*words(reference / "gqa", save, corpus, "--bf16"), says="--no-load-optim")
    ok(*words(reference / "gqa", save, corpus, "--bf16", "--no-load-optim"))
    assert list(losses(save)) == [1, 2, 3, 4, 5, 6]


def test_a_dry_run_tells_and_writes_nothing(tmp_path: Path, reference: Path, corpus: Path) -> None:
    flags = ("--dry-run", "--tensor-model-parallel-size", 3, "--context-parallel-size", 2)
    done = ok(*words(reference / "gqa", tmp_path / "run", corpus, *flags))
    assert "6 of 4 x 32 tokens, 768 tokens in all" in done.out
    assert "TP 3 x PP 1 x DP 1 x CP 2" in done.out
    assert not (tmp_path / "run").exists()
    assert run(*words(reference / "gqa", tmp_path / "run", "nowhere", *flags)).code == 2


def test_the_trained_model_leaves_as_hugging_face(whole: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ok("convert", "--load", whole, "--save", tmp_path / "hf", "--to", "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    found = model.model.norm.weight.detach()
    assert torch.equal(found, weights(whole)["decoder.final_layernorm.weight"])
