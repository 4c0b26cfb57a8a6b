"""Pico models with a chat tokenizer and padding rows, and plans for their vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from emb_pruner.formats import open_vocabulary
from emb_pruner.selection import select
from emb_pruner.vocab_plan import VocabPlan
from tests.pico import TEXT, make_model, write_tokenizer

TOKENS, ROWS = 602, 620  # of the tokenizer, of the model
TURN, END = TOKENS - 2, TOKENS - 1  # <|turn|> and <|end|>
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}<|end|>"
    "{% endfor %}"
)
TALK = TEXT * 2 + "user: the a: fox"
GENERATION = {"eos_token_id": [1, END], "pad_token_id": END, "suppress_tokens": [TURN]}


def make_chat_model(folder: Path, kind: str) -> Path:
    """``kind`` of `tests.pico.KINDS` with two more special tokens and a chat template."""
    from transformers import AutoTokenizer

    make_model(folder, kind, vocab_size=ROWS, eos_token_id=[1, END], pad_token_id=END)
    write_tokenizer(folder, TOKENS - 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == TOKENS
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | GENERATION))
    return folder


def as_bin(source: Path, folder: Path) -> Path:
    """The same model with a pytorch_model.bin."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def write_vocab_plan(model: Path, size: int, file: Path) -> VocabPlan:
    """Those of `TALK` and any others, from all over the vocabulary."""
    vocabulary = open_vocabulary(model)
    counts = np.random.default_rng(2).integers(1, 1000, vocabulary.forest.size)
    counts[vocabulary.encode([TALK])[0]] += 10_000
    plan = VocabPlan(
        kept=select(vocabulary.forest, size, method="leaf", counts_V=counts),
        source_size=vocabulary.forest.size,
        tokenizer_digest=vocabulary.digest,
        method="leaf",
    )
    file.write_text(plan.to_json())
    return plan
