"""Mutated files of every format: whatever they hold, a command succeeds or ends with 2, 3 or 4.

`run` lets what is no error of ours escape. A case is a folder with one valid file in it, and the
commands that read it. Bytes are flipped, cut, put in and repeated; of JSON also single values are
replaced by what is hard to bear. A few tries of each run with all tests, 2000 of each as `slow`.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune.data.domain_recipe import read_recipe, target_losses
from megatron_prune.data.indexed import CorpusWriter
from megatron_prune.data.sidecar import check_corpus
from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.errors import PruneError
from megatron_prune.planning.plan import load_plan
from megatron_prune.report.inputs import read_inputs
from megatron_prune.report.page import csv_bytes
from megatron_prune.report.sections import report_sections
from megatron_prune.sources.folding_record import Folding, load_folding
from megatron_prune.sources.repair_record import Repair, Replaced, load_repair
from megatron_prune.store import open_source
from tests import pico
from tests.gates import random_gates
from tests.pico import TEXT, ok, run
from tests.sparse import make_sparse

FEW, MANY = 30, 2000
SECONDS = 20  # of CPU: a try that takes as long is a loop without bounds
NASTY: tuple[Any, ...] = (
    *(None, True, "", "\0", "../x", "\ud800", [], {}, [[[]]], {"a": {"a": 1}}, "x" * 5000),
    *(-1, 0, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -1e-320, float("nan"), float("inf")),
)
TINY = {
    "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 300,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The file that is mutated, and what reads it: commands, or a function that does."""

    file: Path
    reads: tuple[tuple[object, ...] | Callable[[], object], ...]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    if not isinstance(value, dict | list):
        return []
    found = []
    for key, inner in list(value.items()) if isinstance(value, dict) else enumerate(value):
        found += [(value, key), *places(inner)]
    return found


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Another file that is nearly this one."""
    if rng.random() < 0.6:
        try:
            values = json.loads(data)
        except ValueError:
            values = None
        if found := places(values):
            for _ in range(rng.choice((1, 1, 2, 5))):
                container, key = rng.choice(found)
                if isinstance(container, dict) and rng.random() < 0.2:
                    container.pop(key, None)
                else:
                    container[key] = copy.deepcopy(rng.choice(NASTY))
            return json.dumps(values).encode()
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 10))):
        at = rng.randrange(len(out) + 1)
        kind = rng.choice(("flip", "flip", "cut", "random", "repeat", "deep", "digits", "drop"))
        if kind == "flip" and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == "cut" and rng.random() < 0.3:
            del out[at:]
        elif kind == "random":
            out[at : at + 8] = rng.randbytes(8)
        elif kind == "repeat":
            out[at:at] = out[at : at + rng.randrange(200)]
        elif kind == "drop":
            del out[at : at + rng.randrange(20)]
        elif kind == "deep" and rng.random() < 0.3:
            out[at:at] = rng.choice((b"[", b'{"a":', b"- ", b"{")) * 3000
        elif kind == "digits":
            out[at:at] = b"9" * rng.choice((1, 20, 400, 5000))
    return bytes(out)


def fuzz(case: Case, tries: int) -> int:
    """Returns how many tries were refused."""
    valid, rng, refusals = case.file.read_bytes(), random.Random(case.file.name), 0
    for read in case.reads:
        assert done(read) == 0, f"{case.file}: refused as it is by {read}"
    for number in range(tries):
        data = mutated(valid, rng)
        case.file.write_bytes(data)
        for read in case.reads:
            began = time.process_time()
            try:
                code = done(read)
            except BaseException as error:
                raise AssertionError(f"{case.file.name}, try {number}: {data[:2000]!r}") from error
            assert code in (0, 2, 3, 4), f"{case.file.name}, try {number}: exit {code}"
            assert time.process_time() - began < SECONDS, f"{case.file.name}, try {number}: slow"
            refusals += code != 0
    case.file.write_bytes(valid)
    return refusals


def done(read: tuple[object, ...] | Callable[[], object]) -> int:
    """The exit code."""
    if isinstance(read, tuple):
        return run(*read).code
    try:
        read()
    except PruneError as error:
        return error.exit_code
    return 0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in three formats, with what the stages make of it."""
    root = tmp_path_factory.mktemp("fuzz")
    model = pico.make_model(root / "hf", "gqa", **TINY)
    pico.write_tokenizer(model, 300)
    (root / "t.txt").write_text(TEXT * 10)
    (root / "t.jsonl").write_text(json.dumps({"text": TEXT * 10}) + "\n")
    load, shards = ("--load", model), ("--max-shard-size", "2KB")
    ok("convert", *load, "--save", root / "sharded", "--to", "hf", *shards)
    ok("convert", *load, "--save", root / "dist", "--to", "megatron")
    ok("plan", *load, "--save", root / "plan.json", "--ffn-hidden-size-remain", 6)
    scored = ("--criterion", "magnitude", "--save", root / "s.safetensors")
    ok("score", *load, *scored)
    vocab = ("--tokenizer", model)
    ok("vocab", "count", *vocab, "--input", root / "t.txt", "--save", root / "counts.npz")
    size = ("--vocab-size-remain", 280, "--any-size", "--counts", root / "counts.npz")
    ok("vocab", "plan", *vocab, *size, "--save", root / "v.json")
    return root


def checkpoint_reads(folder: Path, out: Path) -> tuple[tuple[object, ...], ...]:
    to = ("--to", "hf", "--overwrite", "--allow-nonfinite")
    return (("inspect", folder), ("convert", "--load", folder, "--save", out, *to))


def tokenizer_reads(tokenizer: Path, root: Path) -> tuple[tuple[object, ...], ...]:
    size = ("--vocab-size-remain", 280, "--any-size", "--overwrite")
    text = ("--input", root / "t.jsonl", "--output-prefix", root / "c", "--dry-run")
    return (
        ("vocab", "plan", "--tokenizer", tokenizer, *size, "--save", root / "out.json"),
        ("preprocess", "--tokenizer-model", tokenizer, *text),
    )


def model_file(name: str, source: str = "hf") -> Callable[[Path, Path], Case]:
    def make(root: Path, folder: Path) -> Case:
        shutil.copytree(root / source, folder / "m")
        return Case(next((folder / "m").rglob(name)), checkpoint_reads(folder / "m", folder / "o"))

    return make


def tokenizer_file(name: str) -> Callable[[Path, Path], Case]:
    def make(root: Path, folder: Path) -> Case:
        shutil.copytree(root / "hf", folder / "m")
        return Case(folder / "m" / name, tokenizer_reads(folder / "m", root))

    return make


def beside(name: str, *words: object) -> Callable[[Path, Path], Case]:
    """A file of ``root`` that a command on the model takes; ``FILE`` stands for it."""

    def make(root: Path, folder: Path) -> Case:
        file = Path(shutil.copy(root / name, folder / name))
        names = {"FILE": file, "HF": root / "hf", "OUT": folder / "o"}
        return Case(file, (tuple(names.get(str(word), word) for word in words),))

    return make


def domains(root: Path, folder: Path) -> Case:
    file = folder / "d.yaml"
    file.write_text(DOMAINS)
    return Case(file, (lambda: target_losses(read_recipe(file), 10**6),))


def recipe(root: Path, folder: Path) -> Case:
    text = f"load: {root / 'hf'}\nsave: {folder / 'o'}\nffn-hidden-size-remain: 6\nseed: 3\n"
    (folder / "r.yaml").write_text(text + "dry-run: true\nbalance-for: 1\ncriterion: random\n")
    return Case(folder / "r.yaml", (("plan", "--config", folder / "r.yaml"),))


def corpus(suffix: str) -> Callable[[Path, Path], Case]:
    def make(root: Path, folder: Path) -> Case:
        facts = {"version": 1, "tokenizer_digest": "d", "vocab_size": 300, "eod": None}
        with CorpusWriter(folder / "c", np.dtype(np.uint16)) as writer:
            tokens = np.arange(60, dtype=np.uint16)
            writer.add(tokens, np.array([20, 30, 10], np.int32), np.array([1, 2]))
            writer.prepare(facts)
            writer.publish()
        return Case(folder / f"c{suffix}", (lambda: check_corpus(folder / "c", None, 300),))

    return make


def repair(root: Path, folder: Path) -> Case:
    plan = load_plan(root / "plan.json")
    replaced = Replaced(how="norm-rescale", sha256={"fp32": "0" * 64}, ratio=0.5)
    record = Repair(
        plan_digest=plan.digest, source_digest=plan.source_digest, settings={"tokens": 9},
        tensors={"decoder.layers.0.input_layernorm.weight": replaced},
    )  # fmt: skip
    (folder / "repair.json").write_text(record.to_json())
    config = open_source(root / "hf").config
    return Case(
        folder / "repair.json", (lambda: load_repair(folder / "repair.json", plan, config),)
    )


def folding(root: Path, folder: Path) -> Case:
    plan = load_plan(root / "plan.json")
    record = Folding(
        plan_digest=plan.digest, source_digest=plan.source_digest, settings={"iteration": 9},
        gates=random_gates(plan.target),
    )  # fmt: skip
    (folder / "folding.json").write_text(record.to_json())
    config = replace(open_source(root / "hf").config, shape=plan.target)
    return Case(
        folder / "folding.json", (lambda: load_folding(folder / "folding.json", plan, config),)
    )


def sparsity(root: Path, folder: Path) -> Case:
    make_sparse(root / "hf", folder / "m")
    (folder / "m/manifest.json").unlink()
    file = folder / "m/sparsity.json"
    proved = ("verify", "--load", folder / "m", "--source", root / "hf")

    def shown() -> None:
        for section in report_sections(read_inputs([file]), None):
            for sheet in section.sheets:
                csv_bytes(sheet)  # drawing takes a second

    return Case(file, (*checkpoint_reads(folder / "m", folder / "o"), proved, shown))


def sentencepiece(root: Path, folder: Path) -> Case:
    from sentencepiece import SentencePieceTrainer

    with open(folder / "t.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT] * 20), model_writer=file, vocab_size=60,
            model_type="bpe", minloglevel=3,
        )  # fmt: skip
    plan = ("vocab", "plan", "--tokenizer", folder / "t.model", "--save", folder / "o.json")
    size = ("--vocab-size-remain", 55, "--any-size", "--overwrite")
    return Case(folder / "t.model", ((*plan, *size), lambda: load_tokenizer(folder / "t.model")))


def tiktoken(root: Path, folder: Path) -> Case:
    import base64

    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the"]
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    plan = ("vocab", "plan", "--tokenizer", folder / "qwen.tiktoken", "--save", folder / "o.json")
    size = ("--vocab-size-remain", 466, "--any-size", "--overwrite")
    return Case(folder / "qwen.tiktoken", ((*plan, *size),))


DOMAINS = """targets: null
parameters: 1000000
domains:
- {name: web, prefixes: [a, b], weight: 0.7, target: 2.5}
- {name: code, prefixes: c, weight: 3, scaling: [{parameters: 1e6, loss: 3.0},
   {parameters: 1e7, loss: 2.5}, {parameters: 1e8, loss: 2.2}]}
"""
MAKERS: dict[str, Callable[[Path, Path], Case]] = {
    "config.json": model_file("config.json"),
    "index.json": model_file("*.index.json", "sharded"),
    "safetensors": model_file("model.safetensors"),
    "manifest.json": model_file("manifest.json", "sharded"),
    ".metadata": model_file(".metadata", "dist"),
    "common.pt": model_file("common.pt", "dist"),
    ".distcp": model_file("*.distcp", "dist"),
    "metadata.json": model_file("metadata.json", "dist"),
    "tokenizer.json": tokenizer_file("tokenizer.json"),
    "tokenizer_config.json": tokenizer_file("tokenizer_config.json"),
    "plan.json": beside(
        "plan.json",
        *("prune", "--load", "HF", "--plan", "FILE", "--save", "OUT", "--to", "hf", "--dry-run"),
    ),
    "scores": beside(
        "s.safetensors",
        *("plan", "--load", "HF", "--scores", "FILE", "--criterion", "magnitude", "--save", "OUT"),
        *("--ffn-hidden-size-remain", 6, "--overwrite"),
    ),
    "counts.npz": beside(
        "counts.npz",
        *("vocab", "plan", "--tokenizer", "HF", "--counts", "FILE", "--save", "OUT"),
        *("--vocab-size-remain", 280, "--any-size", "--overwrite"),
    ),
    "vocab plan": beside(
        "v.json",
        *("vocab", "prune", "--load", "HF", "--plan", "FILE", "--save", "OUT", "--to", "hf"),
        "--dry-run",
    ),
    "recipe": recipe,
    "domains": domains,
    "idx": corpus(".idx"),
    "sidecar": corpus(".json"),
    "repair.json": repair,
    "folding.json": folding,
    "sparsity.json": sparsity,
    "tokenizer.model": sentencepiece,
    "tiktoken": tiktoken,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_mutated_file_is_refused_or_harmless(kind: str, root: Path, tmp_path: Path) -> None:
    assert fuzz(MAKERS[kind](root, tmp_path), FEW) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_2000_mutated_files_are_refused_or_harmless(kind: str, root: Path, tmp_path: Path) -> None:
    assert fuzz(MAKERS[kind](root, tmp_path), MANY) > 0
