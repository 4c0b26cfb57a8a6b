"""A stage that is called says nothing, and leaves the same files as its command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_prune import stages
from tests.engine.runs import SHORT, told, weights, words
from tests.pico import TEXT, directory_bytes, ok

Models, Plans = Callable[[str], Path], Callable[[str], Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": TEXT * count}) for count in range(1, 9)))
    return path


@pytest.fixture(autouse=True)
def _silence(capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()


def _same(tmp_path: Path) -> bool:
    return directory_bytes(tmp_path / "command") == directory_bytes(tmp_path / "function")


def _folders(tmp_path: Path) -> tuple[Path, Path]:
    command, function = tmp_path / "command", tmp_path / "function"
    command.mkdir()
    function.mkdir()
    return command, function


def test_preprocess(
    models: Models, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command, function = _folders(tmp_path)
    model = models("gqa")
    ok("preprocess", "--input", text, "--tokenizer-model", model,
       "--output-prefix", command / "x", "--append-eod")  # fmt: skip
    capfd.readouterr()
    found = stages.preprocess(
        stages.PreprocessOptions(
            input=(str(text),),
            tokenizer_model=str(model),
            output_prefix=str(function / "x"),
            append_eod=True,
        )
    )
    assert capfd.readouterr() == ("", "")
    assert _same(tmp_path) and len(list(command.iterdir())) == 3
    (corpus,) = found.corpora
    assert corpus.prefix == str(function / "x_text_document") and corpus.documents == 8


def test_vocab_count_and_plan(
    models: Models, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command, function = _folders(tmp_path)
    tokenizer = models("gqa")
    ok("vocab", "count", "--tokenizer", tokenizer, "--input", text, "--save", command / "n.npz")
    ok("vocab", "plan", "--tokenizer", tokenizer, "--counts", command / "n.npz",
       "--vocab-size-remain", 300, "--any-size", "--save", command / "plan.json")  # fmt: skip
    capfd.readouterr()
    counted = stages.vocab_count(
        stages.VocabCountOptions(tokenizer=tokenizer, input=(text,), save=function / "n.npz")
    )
    planned = stages.vocab_plan(
        stages.VocabPlanOptions(
            tokenizer=tokenizer,
            counts=function / "n.npz",
            vocab_size_remain=300,
            any_size=True,
            save=function / "plan.json",
        )
    )
    assert capfd.readouterr() == ("", "")
    assert _same(tmp_path)
    assert counted.documents == 8 and planned.plan.size == 300


def test_report(plans: Plans, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command, function = _folders(tmp_path)
    plan = plans("gqa")
    ok("report", plan, "--save", command / "page.html", "--png-dir", command / "figures")
    capfd.readouterr()
    found = stages.report(
        stages.ReportOptions(
            inputs=(str(plan),), save=function / "page.html", png_dir=function / "figures"
        )
    )
    assert capfd.readouterr() == ("", "")
    assert _same(tmp_path) and found.beside == ((function / "figures", len(list(
        (function / "figures").iterdir()))),)  # fmt: skip


def test_evaluate_and_generate(
    models: Models, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, kept = models("gqa"), tmp_path / "found.json"
    ok("evaluate", "--load", model, "--data", text, "--seq-length", 32, "--json", kept)
    said = ok("generate", "--load", model, "--prompt", TEXT, "--max-new-tokens", 3).out
    capfd.readouterr()
    judged = stages.evaluate(stages.EvaluateOptions(load=model, data=text, seq_length=32))
    added = stages.generate(stages.GenerateOptions(load=model, prompt=TEXT, max_new_tokens=3))
    assert capfd.readouterr() == ("", "")
    timed = {"seconds", "tokens_per_second"}
    facts = json.loads(kept.read_text())
    assert set(facts) == set(judged.facts) > timed
    assert all(facts[name] == judged.facts[name] for name in set(facts) - timed)
    assert str(added) + "\n" == said and len(added.tokens) == 3


def test_train(models: Models, text: Path, tmp_path: Path) -> None:
    model, corpus = models("gqa"), tmp_path / "x_text_document"
    ok("preprocess", "--input", text, "--tokenizer-model", model, "--output-prefix", tmp_path / "x")
    command = words(model, tmp_path / "command", corpus)
    ok(*command)
    stages.train(
        stages.TrainOptions(
            load=model,
            save=tmp_path / "function",
            data_path=(str(corpus),),
            command=tuple(command),
            micro_batch_size=2,
            global_batch_size=4,
            seq_length=32,
            lr=1e-3,
            min_lr=1e-4,
            lr_decay_style="cosine",
            lr_warmup_iters=2,
            train_iters=6,
            save_interval=3,
            log_interval=1,
            seed=5,
            eval_interval=3,
            eval_iters=1,
            split="80,20,0",
        )
    )
    assert len(SHORT) == 28  # all of them are above
    assert told(tmp_path / "command") == told(tmp_path / "function")
    theirs, mine = weights(tmp_path / "command"), weights(tmp_path / "function")
    assert all(torch.equal(theirs[name], mine[name]) for name in theirs)
    for name in ("commands.jsonl",):
        assert (tmp_path / "command" / name).read_bytes() == (
            tmp_path / "function" / name
        ).read_bytes()


def test_a_prompt_in_two_places_is_refused() -> None:
    from megatron_prune.errors import ConfigError

    options = stages.GenerateOptions(load=Path("x"), prompt="a", prompt_file=Path("b"))
    with pytest.raises(ConfigError, match="--prompt and --prompt-file: give one of"):
        stages.generate(options)
