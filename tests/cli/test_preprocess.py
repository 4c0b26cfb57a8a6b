"""``megatron-prune preprocess`` from outside: what it writes, says, refuses and leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
import sentencepiece

from megatron_prune.data import indexed
from megatron_prune.data.sidecar import check_corpus
from megatron_prune.data.tokenizers import load_tokenizer
from tests import launch
from tests.launch import Process

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "engineers",
    "prune",
    "one",
    "model",
    "shard",
]


def sentences_of(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(5, 60))) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences_of(0, 200)),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def write_jsonl(path: Path, count: int) -> list[str]:
    texts = sentences_of(1, count)
    path.write_text("".join(json.dumps({"text": t, "title": t[:12]}) + "\n" for t in texts))
    return texts


def run(*args: object, **more: str) -> subprocess.CompletedProcess[str]:
    return launch.fork_and_wait(launch.PROGRAM, "preprocess", *args, NLTK_DATA="", **more)


def files_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def documents_of(prefix: Path) -> list[list[int]]:
    raw, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    magic, version, code, count, ends = struct.unpack_from("<9sQBQQ", raw)
    assert (magic, version, code, ends) == (b"MMIDIDX\x00\x00", 1, 8, count + 1)
    lengths = struct.unpack_from(f"<{count}i", raw, 34)
    starts = struct.unpack_from(f"<{count}q", raw, 34 + 4 * count)
    return [
        list(struct.unpack_from(f"<{length}H", data, start))
        for length, start in zip(lengths, starts, strict=True)
    ]


def test_any_number_of_workers_writes_the_same_corpus(tmp_path: Path, tokenizer: Path) -> None:
    texts = write_jsonl(tmp_path / "a.jsonl", 6000)  # three chunks
    found = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        done = run("--input", tmp_path / "a.jsonl", "--tokenizer-model", tokenizer, "--append-eod",
                   "--output-prefix", out / "corp", "--workers", workers)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(
            rf"{out}/corp_text_document: 6000 documents, \d+ tokens, \d+ bytes, [\d.]+ seconds\n",
            done.stdout,
        )
        assert "100%" in done.stderr and "tokens/s" in done.stderr
        found.append(files_of(out))
    assert found[0] == found[1]
    assert list(found[0]) == [f"corp_text_document.{s}" for s in ("bin", "idx", "json")]
    ours = load_tokenizer(tokenizer)
    wanted = [[*ours.encode(text, True), ours.eod] for text in texts]
    assert documents_of(tmp_path / "out1" / "corp_text_document") == wanted
    facts = check_corpus(tmp_path / "out1" / "corp_text_document", ours.digest, 300, read_all=True)
    assert (facts.documents, facts.eod) == (6000, ours.eod)
    assert facts.tokens == sum(map(len, wanted))


def test_sentences_and_several_keys_have_the_names_of_stock_megatron(
    tmp_path: Path, tokenizer: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl", 40)
    (tmp_path / "out").mkdir()
    jsonl = tmp_path / "a.jsonl"
    done = run("--input", jsonl, jsonl, "--json_keys", "text", "title",
               "--tokenizer_model", tokenizer, "--output_prefix", tmp_path / "out" / "c.v1",
               "--split_sentences")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "punkt trained on the first" in done.stderr
    names = [f"c.v1_{k}_sentence.{s}" for k in ("text", "title") for s in ("bin", "idx", "json")]
    assert list(files_of(tmp_path / "out")) == names
    for key in ("text", "title"):
        assert check_corpus(tmp_path / "out" / f"c.v1_{key}_sentence", None, 300).documents == 80
        assert f"c.v1_{key}_sentence: 80 documents" in done.stdout


def test_a_dry_run_tells_and_writes_nothing(tmp_path: Path, tokenizer: Path) -> None:
    texts = write_jsonl(tmp_path / "a.jsonl", 40)
    done = run("--input", tmp_path / "a.jsonl", "--tokenizer-model", tokenizer,
               "--output-prefix", tmp_path / "out" / "c", "--dry-run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = load_tokenizer(tokenizer)
    tokens = sum(len(ours.encode(text, True)) for text in texts)
    assert f"would write {tmp_path}/out/c_text_document.bin" in done.stdout
    assert f"about {tokens} tokens, {2 * tokens} bytes of uint16" in done.stdout
    assert not (tmp_path / "out").exists()


def test_only_the_first_rank_works(tmp_path: Path, tokenizer: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", 4)
    done = run("--input", tmp_path / "a.jsonl", "--tokenizer-model", tokenizer,
               "--output-prefix", tmp_path / "c", RANK="1", WORLD_SIZE="2")  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert list(files_of(tmp_path)) == ["a.jsonl"]


REFUSALS = {
    "existing": (["--json-key", "text"], r"old_text_document\.bin exists; --overwrite"),
    "existing, dry run": (["--dry-run"], r"old_text_document\.bin exists; --overwrite"),
    "no key": (["--json-key", "body"], r"a\.jsonl, line 1: no key 'body'"),
    "no file": (["--input", "nowhere.jsonl"], r"--input nowhere\.jsonl: No such file"),
    "not json": (["--input", "words.jsonl"], r"words\.jsonl, line 2: not JSON"),
    "empty file": (["--input", "empty.jsonl"], r"empty corpus: 0 documents .* 'text'"),
    "no tokens": (["--input", "void.jsonl"], r"empty corpus: 2 documents and not one token"),
    "no tokenizer": (["--tokenizer-model", "nowhere"], r"tokenizer nowhere: no such file"),
    "unknown": (["--tokenizer-model", "bare.json"], r"\d+ of the \d+ tokens .* are unknown \(id 1"),
    "workers": (["--workers", "0"], r"--workers 0: wanted 1 or more"),
    "key as path": (["--json-key", "../text"], r"--json-key '\.\./text'"),
    "key twice": (["--json-key", "text", "text"], r"--json-key 'text'"),
    "no eos": (["--tokenizer-model", "bare.json", "--append-eod"], r"does not tell its EOS"),
    "input as output": (
        ["--input", "in_text_document.json", "--overwrite", "--output-prefix", "in"],
        r"in_text_document\.json is an input",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("place")
    write_jsonl(folder / "a.jsonl", 4)
    write_jsonl(folder / "in_text_document.json", 4)
    (folder / "words.jsonl").write_text('{"text": "a"}\nwords\n')
    (folder / "empty.jsonl").touch()
    (folder / "void.jsonl").write_text('{"text": ""}\n\n{"text": " "}\n')
    (folder / "old_text_document.bin").write_bytes(b"precious")
    vocabulary = {"a": 0, "[UNK]": 1}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.save(str(folder / "bare.json"))
    return folder


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    case: str, place: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from megatron_prune.cli import main

    monkeypatch.chdir(place)
    before = files_of(place)
    changes, needle = REFUSALS[case]
    prefix = "old" if case.startswith("existing") else "new"
    base = ["--input", "a.jsonl", "--tokenizer-model", str(tokenizer), "--output-prefix", prefix]
    if case == "no tokens":  # a tokenizer that adds nothing by itself
        changes = [*changes, "--tokenizer-model", "bare.json"]
    assert main(["preprocess", *base, *changes]) == 2
    said = capsys.readouterr()
    line = [x for x in said.err.splitlines() if x.startswith("megatron-prune: error:")]
    assert len(line) == 1 and re.search(needle, line[0]), said.err
    assert said.out == ""
    assert files_of(place) == before


def test_acceptance_ids_of_a_hugging_face_directory(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from megatron_prune.cli import main

    texts = write_jsonl(tmp_path / "a.jsonl", 30)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=377, special_tokens=special))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(tmp_path / "hf")
    assert main(
        ["preprocess", "--input", str(tmp_path / "a.jsonl"), "--json-key", "text", "--append-eod",
         "--tokenizer-model", str(tmp_path / "hf"), "--output-prefix", str(tmp_path / "corp")]
    ) == 0  # fmt: skip
    tok = AutoTokenizer.from_pretrained(tmp_path / "hf")
    wanted = [[*tok(text).input_ids, tok.eos_token_id] for text in texts]
    assert documents_of(tmp_path / "corp_text_document") == wanted


def start_and_wait_for_writing(folder: Path, *args: object) -> Process:
    null = Path(os.devnull)
    process = launch.fork(launch.PROGRAM, ["preprocess", *args], (null, null), NLTK_DATA="")
    launch.until(
        lambda: process.poll() is not None or any(p.name.startswith(".") for p in folder.iterdir()),
        [process],
    )
    return process


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(x) for x in text.split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_kill_9_leaves_nothing_half_written_and_the_next_run_just_works(
    tmp_path: Path, tokenizer: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl", 12000)
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--tokenizer-model", str(tokenizer)]
    (tmp_path / "good").mkdir()
    (tmp_path / "out").mkdir()
    unbroken = start_and_wait_for_writing(
        tmp_path / "good", *arguments, "--output-prefix", tmp_path / "good" / "c"
    )
    began, ended = launch.seconds_of_a_core(unbroken.pid), 0.0

    def is_done() -> bool:
        nonlocal ended
        ended = max(ended, launch.seconds_of_a_core(unbroken.pid))
        return unbroken.poll() is not None

    launch.until(is_done, [unbroken])
    assert unbroken.returncode == 0
    good = files_of(tmp_path / "good")
    arguments += ["--output-prefix", str(tmp_path / "out" / "c")]
    rng = random.Random(0)
    for _ in range(5):
        process = start_and_wait_for_writing(tmp_path / "out", *arguments)
        # by what it has done, not by the clock: a busy machine kills it at the same places
        seconds = began + rng.uniform(0, 0.8) * (ended - began)
        launch.until(
            lambda: process.poll() is not None or launch.seconds_of_a_core(process.pid) >= seconds,  # noqa: B023
            [process], pause_seconds=0.001,
        )  # fmt: skip
        process.end()
        seen = {k: v for k, v in files_of(tmp_path / "out").items() if not k.startswith(".")}
        if "c_text_document.idx" in seen:  # without an index there is no corpus
            assert seen == good
            break
    else:
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == good


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_removes_what_was_begun_and_keeps_the_old(
    tmp_path: Path, tokenizer: Path, number: signal.Signals
) -> None:
    write_jsonl(tmp_path / "a.jsonl", 20000)
    out = tmp_path / "out"
    out.mkdir()
    (out / "c_text_document.idx").write_bytes(b"old")
    process = start_and_wait_for_writing(
        out, "--input", tmp_path / "a.jsonl", "--tokenizer-model", tokenizer,
        "--output-prefix", out / "c", "--overwrite",
    )  # fmt: skip
    process.send_signal(number)
    assert process.wait() == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {"c_text_document.idx": b"old"}


@pytest.mark.parametrize("moment", ["_claim", "_publish"])
def test_a_signal_waits_for_a_safe_moment(
    tmp_path: Path, tokenizer: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_prune.cli import main

    write_jsonl(tmp_path / "a.jsonl", 4)
    (tmp_path / "out").mkdir()
    real = getattr(indexed, moment)

    def signalled(*args: object) -> object:
        result = real(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # where Python looks for signals
        return result

    monkeypatch.setattr(indexed, moment, signalled)
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--tokenizer-model", str(tokenizer)]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        main(["preprocess", *arguments, "--output-prefix", str(tmp_path / "out" / "c")])
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    whole = [f"c_text_document.{s}" for s in ("bin", "idx", "json")]
    assert list(files_of(tmp_path / "out")) == ([] if moment == "_claim" else whole)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path, tokenizer: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", 12000)
    out = tmp_path / "out"
    out.mkdir()
    process = start_and_wait_for_writing(
        out, "--input", tmp_path / "a.jsonl", "--tokenizer-model", tokenizer,
        "--output-prefix", out / "c", "--workers", 2,
    )  # fmt: skip
    workers: list[int] = []

    def have_begun() -> bool:
        workers[:] = children_of(process.pid)  # two, and Python's resource tracker
        return len(workers) == 3 or process.poll() is not None

    launch.until(have_begun, [process])
    assert len(workers) == 3
    process.kill()  # the parent alone
    process.wait()
    deadline = time.monotonic() + 60  # they are importing still
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in workers if is_running(pid)] == []
