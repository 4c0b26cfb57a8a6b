"""``evaluate`` says what transformers says, at every layout and from every format."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.evaluate.perplexity import judge
from tests.engine.on_ranks import Job, launch
from tests.launch import made_once
from tests.pico import TEXT, make_model, ok, refused, write_tokenizer

TP3, PP2 = ("--tensor-model-parallel-size", 3), ("--pipeline-model-parallel-size", 2)
WINDOW, WINDOWS = 48, 5  # in batches of 2 over 2 copies: the last three places are filled up
FLAGS = ("--seq-length", WINDOW, "--max-windows", WINDOWS, "--micro-batch-size", 2)
# kind, ranks, flags
CASES: dict[str, tuple[str, int, tuple[object, ...]]] = {
    "gqa-tp3": ("gqa", 3, TP3),
    "gqa-tp3-sp": ("gqa", 3, (*TP3, "--sequence-parallel")),
    "tied-pp2": ("tied", 2, PP2),
    "qwen-dp2": ("qwen", 2, ()),
    "tied-pp2-dp2": ("tied", 4, PP2),
}
KINDS = ("gqa", "tied", "qwen", "mistral", "llama3-long")


def test_judge_is_the_mean_of_means() -> None:
    found = judge([1.0, 2.0, 4.5], targets_per_window=10, scored_bytes=60)
    assert (found.loss, found.tokens, found.windows) == (2.5, 30, 3)
    assert found.perplexity == math.exp(2.5)
    assert found.bits_per_byte == pytest.approx(2.5 * 30 / math.log(2) / 60)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND, KIND.json by plain transformers, ``text``, and ``CASE.json`` from every layout."""
    with made_once(tmp_path_factory, "evaluated") as (folder, fresh):
        if fresh:
            (folder / "text").write_text("naïve " + TEXT * 40)
            for kind in KINDS:
                _by_transformers(folder, kind)
            _on_ranks(folder)
    return folder


def _by_transformers(folder: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more: dict[str, Any] = {}
    if kind == "llama3-long":  # positions that the scaling changes
        more = {"max_position_embeddings": 256}
    make_model(folder / kind, kind.partition("-")[0], **{"vocab_size": 379, **more})
    model = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / kind)
    ids = tokenizer((folder / "text").read_text(), add_special_tokens=False).input_ids
    windows = [ids[at : at + WINDOW] for at in range(0, WINDOW * WINDOWS, WINDOW)]
    with torch.no_grad():
        losses = [float(model(x, labels=x).loss) for x in torch.tensor(windows)[:, None]]
    scored = "".join(tokenizer.decode(x[1:], clean_up_tokenization_spaces=False) for x in windows)
    loss = sum(losses) / WINDOWS
    bits = loss * WINDOWS * (WINDOW - 1) / math.log(2) / len(scored.encode())
    (folder / f"{kind}.json").write_text(json.dumps({"loss": loss, "bits_per_byte": bits}))


def _on_ranks(folder: Path) -> None:
    jobs = []
    for name, (kind, ranks, flags) in CASES.items():
        where = ("--load", folder / kind, "--data", folder / "text")
        words = ["evaluate", *where, *FLAGS, *flags, "--json", folder / f"{name}.json"]
        jobs.append(Job(check="command", world=ranks, given={"words": [str(w) for w in words]}))
    for name, codes in zip(CASES, launch(jobs, folder / "ranks")):
        assert set(codes) == {0}, (name, codes)


def _check(found: dict[str, Any], wanted: dict[str, float]) -> None:
    assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    assert found["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert (found["tokens"], found["windows"]) == (WINDOWS * (WINDOW - 1), WINDOWS)
    assert found["tokens_per_second"] > 0


@pytest.mark.parametrize("name", CASES)
def test_every_layout_says_what_transformers_says(judged: Path, name: str) -> None:
    wanted = json.loads((judged / f"{CASES[name][0]}.json").read_text())
    _check(json.loads((judged / f"{name}.json").read_text()), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_says_what_transformers_says(judged: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out.json"
    done = ok(
        "evaluate", "--load", judged / kind, "--data", judged / "text", *FLAGS, "--json", out
    )  # fmt: skip
    found = json.loads(out.read_text())
    _check(found, json.loads((judged / f"{kind}.json").read_text()))
    assert f"{found['loss']:.6f}" in done.out
    assert "window" in done.err and "window" in done.out.split("windows")[0] + done.err


def test_shards_are_evaluated_alone(judged: Path, tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "out.json"
    ok("convert", "--load", judged / "gqa", "--save", shards, "--to", "megatron", *TP3)
    ok("evaluate", "--load", shards, "--data", judged / "text", *FLAGS, "--json", out)
    _check(json.loads(out.read_text()), json.loads((judged / "gqa.json").read_text()))


def test_bf16_is_near(judged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    ok(
        "evaluate", "--load", judged / "gqa", "--data", judged / "text", *FLAGS, "--bf16",
        "--json", out,
    )  # fmt: skip
    wanted = json.loads((judged / "gqa.json").read_text())["loss"]
    found = json.loads(out.read_text())["loss"]
    assert found == pytest.approx(wanted, abs=0.05) and found != wanted


@pytest.mark.parametrize(
    ("flags", "says", "code"),
    [
        (("--data", "/nowhere"), "/nowhere", 2),
        (("--load", "/nowhere"), "/nowhere", 2),
        (("--seq-length", 200), "max_position_embeddings 128", 2),
        (("--seq-length", 1), "--seq-length is 1", 2),
        (TP3, "1 processes do not make whole models", 2),
        (("--json", "/nowhere/out.json"), "/nowhere does not exist; make it first", 4),
        (("--json", "{text}"), "one of the inputs; they never change", 2),
        (("--transformer-impl", "transformer_engine"), "use local", 2),
        (("--tokenizer-model", "{larger}"), "vocabulary of 379", 2),
        (("--load", "{nan}"), "the loss of window 0 is nan", 3),
        (("--load", "{mistral}", "--seq-length", 65), "sliding window of 64", 2),
        (("--load", "{yarn}"), "rope scaling 'yarn'", 2),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_refused(
    judged: Path, tmp_path: Path, flags: tuple[object, ...], says: str, code: int
) -> None:
    places = {name: str(tmp_path / name) for name in ("larger", "nan", "yarn")}
    places |= {"mistral": str(judged / "mistral"), "text": str(judged / "text")}
    _prepare(tmp_path, " ".join(map(str, flags)))
    given = [str(flag).format(**places) for flag in flags]
    where = ("--load", judged / "gqa", "--data", judged / "text")
    refused("evaluate", *where, *FLAGS, *given, says=says, code=code)


def _prepare(folder: Path, flags: str) -> None:
    """Make only the models that a refusal needs."""
    if "{larger}" in flags:
        make_model(folder / "larger", "gqa")
        write_tokenizer(folder / "larger", 500)
    if "{nan}" in flags:
        file = make_model(folder / "nan", "gqa") / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"][3] = torch.nan
        save_file(tensors, file, metadata={"format": "pt"})
    if "{yarn}" in flags:
        config = make_model(folder / "yarn", "gqa") / "config.json"
        values = json.loads(config.read_text())
        values["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
        config.write_text(json.dumps(values))
