"""Qwen's first generation, ranks and weights, to fewer tokens: what transformers then opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from emb_pruner.formats import open_vocabulary
from emb_pruner.formats.tiktoken import Tiktoken
from emb_pruner.vocab_plan import load_vocab_plan
from tests.emb_pruner.formats.conftest import FORMATS, prose
from tests.pico import ok, tensors
from tests.qwen1 import make_qwen1

SPECIALS = 208
KEPT = 768
SETTINGS = {
    "tokenizer_class": "QWenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With rows that no token has, as Qwen has them; its twin lies beside it."""
    pytest.importorskip("tiktoken")
    root = tmp_path_factory.mktemp("qwen1")
    ranks = FORMATS["tiktoken"](root)
    end = len(ranks.read_bytes().splitlines())
    folder = make_qwen1(root / "qwen", root / "twin", end + SPECIALS + 17, end)
    ranks.rename(folder / "qwen.tiktoken")
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    (folder / "tokenization_qwen.py").write_text(f"SPECIAL_START_ID = {end}\n")
    return folder


def test_ranks_and_rows_are_pruned_together(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    counts, file, save = (tmp_path / name for name in ("counts.npz", "plan.json", "pruned"))
    (tmp_path / "corpus.txt").write_text("".join(prose()))
    corpus = ("--input", tmp_path / "corpus.txt")
    ok("vocab", "count", "--tokenizer", model, *corpus, "--save", counts)
    size = ("--counts", counts, "--vocab-size-remain", KEPT)
    ok("vocab", "plan", "--tokenizer", model, *size, "--save", file)
    ok("vocab", "prune", "--load", model, "--plan", file, "--save", save, "--to", "hf")
    plan, source = load_vocab_plan(file), open_vocabulary(model)
    assert isinstance(source, Tiktoken) and plan.size == KEPT

    pruned, wanted = tensors(save), tensors(model.parent / "twin")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(pruned[name], wanted[name][list(plan.kept)])
    ranks, tokenizer = Tiktoken(save, save / "qwen.tiktoken"), AutoTokenizer.from_pretrained(save)
    for text in (*prose()[:200], "<|im_start|>user\nx<|im_end|>"):
        ids = tokenizer(text).input_ids
        assert ids == ranks.encode([text])[0] and tokenizer.decode(ids) == text
    start = len(ranks.ranks)
    assert tokenizer.eos_token_id == start
    assert (save / "tokenization_qwen.py").read_text() == f"SPECIAL_START_ID = {start}\n"
    settings = json.loads((save / "generation_config.json").read_text())
    assert settings["eos_token_id"] == settings["pad_token_id"] == start
    assert settings["stop_words_ids"] == [[start]]

    kept = [token for token in source.encode(["".join(prose())])[0] if token in plan.new_ids][:64]
    new = torch.tensor([[plan.new_ids[token] for token in kept]])
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (model.parent / "twin", save)
    )
    with torch.no_grad():
        logits = before(torch.tensor([kept])).logits[..., list(plan.kept)]
        assert torch.equal(after(new).logits, logits)
