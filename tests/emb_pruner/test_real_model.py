"""Promises 5 and 6 on a real model: SmolLM2-135M-Instruct, cut to 16384 tokens at TP=3.

bash scripts/test.sh -m real_model tests/emb_pruner/test_real_model.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from emb_pruner.vocab_plan import VocabPlan
from tests.emb_pruner.models import TALK, write_vocab_plan
from tests.pico import ok, tensors
from tests.real_model import MARKS, MODEL

TP3 = ("--tensor-model-parallel-size", 3)

pytestmark = MARKS


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VocabPlan]:
    """Through legacy shards and distributed ones, back to Hugging Face."""
    root = tmp_path_factory.mktemp("pruned")
    plan = write_vocab_plan(MODEL, 16384, root / "p.json")
    to = ("--to", "megatron", "--ckpt-format", "torch", *TP3)
    ok("convert", "--load", MODEL, "--save", root / "shards", *to)
    cut = ("--plan", root / "p.json", "--to", "megatron", *TP3)
    ok("vocab", "prune", "--load", root / "shards", "--save", root / "pruned", *cut)
    ok("convert", "--load", root / "pruned", "--save", root / "hf", "--to", "hf")
    return root / "hf", plan


def test_rows_are_those_of_the_kept_tokens(pruned: tuple[Path, VocabPlan]) -> None:
    folder, plan = pruned
    name = "model.embed_tokens.weight"
    found, whole = tensors(folder)[name], tensors(MODEL)[name]
    assert torch.equal(found, whole.index_select(0, torch.tensor(plan.kept)))


def test_logits_are_the_sources_columns(pruned: tuple[Path, VocabPlan]) -> None:
    """Of two tokens or more: for a single one the BLAS library sums in an order that depends on
    the number of rows."""
    from transformers import AutoModelForCausalLM

    folder, plan = pruned
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (MODEL, folder)
    ]
    kept = torch.tensor(plan.kept)
    new = torch.randint(plan.size, (1, 64), generator=torch.Generator().manual_seed(0))
    for ids in (new, new[:, :2]):
        with torch.no_grad():
            wanted, found = models[0](kept[ids]).logits[..., kept], models[1](ids).logits
        assert torch.equal(found, wanted)


def test_text_and_chats_become_the_mapped_ids(pruned: tuple[Path, VocabPlan]) -> None:
    from transformers import AutoTokenizer

    folder, plan = pruned
    before, after = (AutoTokenizer.from_pretrained(path) for path in (MODEL, folder))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = [
        tokenizer.apply_chat_template(chat, tokenize=False) for tokenizer in (before, after)
    ]
    assert rendered[0] == rendered[1]
    for text in (TALK, TALK.upper(), "def f(x):\n    return x**2  # naïve 🙂\n", rendered[0]):
        old, new = before(text)["input_ids"], after(text)["input_ids"]
        assert after.decode(new) == before.decode(old)
        old_specials = [token for token in old if token in before.all_special_ids]
        new_specials = [token for token in new if token in after.all_special_ids]
        assert new_specials == [plan.new_ids[token] for token in old_specials]
        if text is TALK:
            assert new == [plan.new_ids[token] for token in old]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        old, new = (
            json.loads((path / "config.json").read_text())[name] for path in (MODEL, folder)
        )
        assert new == plan.new_ids[old]
