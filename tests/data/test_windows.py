from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.data.windows import read_text, scored_bytes, token_windows
from megatron_prune.errors import ConfigError


def test_windows_and_bytes_are_those_of_the_written_rule(bpe: Path, texts: list[str]) -> None:
    """The rule of the issue, in transformers' words."""
    text = " \n" + "\n".join(texts) + " \n"  # nothing may be stripped
    tok = AutoTokenizer.from_pretrained(bpe)
    ids = torch.tensor(tok(text, add_special_tokens=False).input_ids)
    wanted = ids[: len(ids) // 64 * 64].view(-1, 64)
    tokenizer = load_tokenizer(bpe)
    windows = token_windows(tokenizer, text, 64)
    assert len(ids) % 64 != 0 and len(wanted) > 8
    assert windows.dtype == torch.int64 and torch.equal(windows, wanted)
    assert torch.equal(token_windows(tokenizer, text, 64, 8), wanted[:8])
    assert torch.equal(token_windows(tokenizer, text, 64, 10**9), wanted)
    assert scored_bytes(tokenizer, windows) == sum(
        len(tok.decode(x[1:], clean_up_tokenization_spaces=False).encode()) for x in wanted
    )


def test_scored_bytes_leave_out_the_first_token_of_each_window(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    windows = torch.tensor([tokenizer.encode("the the", False)[:2]] * 3)
    first = tokenizer.decode(windows[0, :1].tolist())
    whole = tokenizer.decode(windows[0].tolist())
    assert scored_bytes(tokenizer, windows) == 3 * (len(whole) - len(first))


def test_a_text_shorter_than_a_window_is_refused(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    count = len(tokenizer.encode("the quick brown fox", False))
    assert token_windows(tokenizer, "the quick brown fox", count).shape == (1, count)
    with pytest.raises(ConfigError, match=f"has {count} tokens, one window takes {count + 1}"):
        token_windows(tokenizer, "the quick brown fox", count + 1)
    with pytest.raises(ConfigError, match="has 0 tokens"):
        token_windows(tokenizer, "", 8)
    with pytest.raises(ConfigError, match="--seq-length 1"):
        token_windows(tokenizer, "the quick brown fox", 1)
    with pytest.raises(ConfigError, match="--max-windows 0"):
        token_windows(tokenizer, "the quick brown fox", 2, 0)


def test_text_is_read_as_it_is_and_json_lines_are_joined(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one  \n two é\n")
    assert read_text(tmp_path / "a.txt") == "one  \n two é\n"
    lines = "".join(json.dumps({"text": t, "b": t * 2}) + "\n" for t in ("x", "é", ""))
    (tmp_path / "a.jsonl").write_text(lines)
    assert read_text(tmp_path / "a.jsonl") == "x\né\n"


def test_text_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nwords\n')
    (tmp_path / "other.jsonl").write_text('{"content": "x"}\n')
    (tmp_path / "a.txt.gz").write_bytes(b"\x1f\x8b\x08\x00")
    (tmp_path / "model").write_bytes(b'\x88\x13\0\0\0\0\0\0{"__metadata__":{}}\xff')
    for name, needle in (
        ("latin.txt", "not UTF-8"),
        ("other.jsonl", "keys there: 'content'; wanted 'text'; rename one of them"),
        ("a.txt.gz", "is packed with gzip; unpack it"),
        ("model", "is a safetensors file"),
        ("a.jsonl", "line 2: not JSON"),
        ("nowhere.txt", "No such file"),
    ):
        with pytest.raises(ConfigError, match=needle) as caught:
            read_text(tmp_path / name)
        assert name in str(caught.value)
        assert "--input" not in str(caught.value) and "--json-key" not in str(caught.value)
