"""Pico models, what transformers makes of them, and a corpus; made once for all workers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.domain_runs import make_corpora
from tests.launch import made_once
from tests.pico import KINDS, TEXT, make_model, ok

SEQ = 48  # divides by every tensor-parallel size here, for sequence parallelism


def token_ids(vocab_size: int, rows: int = 4, length: int = SEQ) -> Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))


def _reference(folder: Path, kind: str) -> None:
    """Transformers' logits and gradients of a pico model, in files."""
    from transformers import AutoModelForCausalLM

    make_model(folder / kind, kind)
    model = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    ids = token_ids(model.config.vocab_size)
    torch.save(ids, folder / f"{kind}.ids.pt")
    with torch.no_grad():
        torch.save(model(ids).logits, folder / f"{kind}.logits.pt")
    longer = token_ids(model.config.vocab_size, length=SEQ + 1)
    torch.save(longer, folder / f"{kind}.longer.pt")
    losses = [model(row[None], labels=row[None]).loss for row in longer]
    loss = torch.stack(losses).mean()
    loss.backward()
    facts = {"loss": loss.item(), "norm": _norm(model)}
    (folder / f"{kind}.json").write_text(json.dumps(facts))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder / f"{kind}-gradients")


def _norm(model: torch.nn.Module) -> float:
    squares = [float(p.grad.double().pow(2).sum()) for p in model.parameters()]
    return float(sum(squares) ** 0.5)


REFERENCED = tuple(kind for kind in KINDS if kind not in ("twin", "mqa", "bf16", "fp16"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND, KIND.ids.pt, KIND.logits.pt, KIND.longer.pt, KIND-gradients and KIND.json each."""
    with made_once(tmp_path_factory, "engine-models") as (folder, fresh):
        if fresh:
            for kind in REFERENCED:
                _reference(folder, kind)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Path:
    """A corpus of every model here; they share one tokenizer."""
    with made_once(tmp_path_factory, "engine-corpus") as (folder, fresh):
        prefix = folder / "words"
        if fresh:
            words, rng = TEXT.split(), random.Random(0)
            lines = [json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(60)]
            (folder / "words.jsonl").write_text("\n".join(lines))
            ok(
                "preprocess", "--input", folder / "words.jsonl", "--json-key", "text",
                "--tokenizer-model", reference / "gqa", "--output-prefix", prefix, "--append-eod",
            )  # fmt: skip
    return folder / "words_text_document"


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Path:
    """Corpora of three domains, of every model here."""
    with made_once(tmp_path_factory, "domain-corpora") as (folder, fresh):
        if fresh:
            make_corpora(folder, reference / "gqa")
    return folder
