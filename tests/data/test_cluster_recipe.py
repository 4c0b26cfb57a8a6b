"""datatrove's Megatron writer, as our recipe sets it up, writes what `preprocess` writes."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prune.cli import main
from megatron_prune.data.sidecar import check_corpus
from megatron_prune.data.tokenizers import load_tokenizer

pytest.importorskip("datatrove")
REPO = Path(__file__).resolve().parents[2]
RECIPE = REPO / "recipes" / "preprocess_on_a_cluster.py"


def _with_bos(folder: Path) -> Path:
    """The tokenizer puts ``<s>`` in front of every text, as Llama's does."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("bos", [pytest.param(False, marks=pytest.mark.slow), True])
def test_byte_for_byte_as_preprocess(
    tmp_path: Path, bpe: Path, texts: list[str], bos: bool
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in bpe.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    if bos:
        _with_bos(model)
    lines = [json.dumps({"text": text}) + "\n" for text in texts if text]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(lines[:30]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[30:40]).encode()))
    (folder / "c.jsonl").write_text("".join(lines[40:]))
    words = ["--input", folder, "--tokenizer-model", model, "--save", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, RECIPE, *words, "--workers", "2"], capture_output=True, text=True, cwd=REPO
    )
    assert done.returncode == 0, done.stderr
    prefixes = done.stdout.split()
    assert prefixes == [str(tmp_path / "out" / f"{n:05d}_tokens") for n in range(3)]
    tokenizer = load_tokenizer(model)
    assert bool(tokenizer.encode("", add_special_tokens=True)) == bos
    for name, prefix in zip(("a.jsonl", "b.jsonl.gz", "c.jsonl"), prefixes, strict=True):
        ours = tmp_path / name[0]
        flags = ["--tokenizer-model", str(model), "--output-prefix", str(ours), "--append-eod"]
        assert main(["preprocess", "--input", str(folder / name), *flags]) == 0
        for suffix in (".bin", ".idx"):
            theirs = Path(prefix + suffix).read_bytes()
            assert theirs == Path(f"{ours}_text_document{suffix}").read_bytes()
        check_corpus(prefix, tokenizer.digest, tokenizer.vocab_size)


def test_what_cannot_be_done_is_said(tmp_path: Path, bpe: Path) -> None:
    words = ["--input", tmp_path, "--tokenizer-model", bpe, "--save", tmp_path / "out"]
    done = subprocess.run([sys.executable, RECIPE, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "no .jsonl file" in done.stderr
