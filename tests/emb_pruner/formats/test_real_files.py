"""The promises on real vocabularies, on 100,000 units each.

Llama-2's model and WikiText-2 are sought in the folder that MEGATRON_PRUNE_DATA names, SmolLM2
where tools/get_default_model.py puts it, the ranks of Qwen and of Llama-3 in the files that
QWEN_TIKTOKEN and LLAMA3_TIKTOKEN name (the wheels `dashscope` and `llama-models` have them).
Llama-3's become a tokenizer.json as transformers makes it: units that are tokens are not merged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import pytest

from emb_pruner.formats import Vocabulary, open_vocabulary
from emb_pruner.formats.rank_files import read_ranks
from megatron_prune.data.tokenizers import transformers_tokenizer
from tests.emb_pruner.formats.conftest import prose
from tests.emb_pruner.formats.promises import (
    broken_units,
    plan_of,
    some_plan,
    strange_texts,
    texts_that_change,
    unclosed_plan,
    write,
    write_unchecked,
)
from tests.real_model import MODEL

DATA = Path(os.environ.get("MEGATRON_PRUNE_DATA", "no such folder"))
FILES = {
    "llama2": (DATA / "llama2.tokenizer.model", 16000),
    "smollm2": (MODEL, 16384),
    "qwen": (Path(os.environ.get("QWEN_TIKTOKEN", "no such file")), 65536),
    "llama3": (Path(os.environ.get("LLAMA3_TIKTOKEN", "no such file")), 65536),
}
UNITS = 100_000

pytestmark = pytest.mark.slow


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def as_llama3(ranks: Path, folder: Path) -> Path:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    converter = TikTokenConverter(str(ranks), LLAMA3_PATTERN, extra_special_tokens=specials)
    tokenizer = converter.converted()
    assert tokenizer.model.ignore_merges
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module", params=list(FILES))
def real(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Vocabulary, int]:
    path, size = FILES[request.param]
    if not path.exists():
        pytest.skip(f"no {path}")
    if request.param == "qwen":
        pytest.importorskip("tiktoken")
    if request.param == "llama3":
        path = as_llama3(path, tmp_path_factory.mktemp("llama3"))
    return open_vocabulary(path), size


def texts(vocabulary: Vocabulary) -> Iterator[str]:
    """Prose, WikiText-2 where it is, then strange texts without end."""
    yield from prose()
    if (DATA / "wikitext2.valid.txt").is_file():
        yield from (DATA / "wikitext2.valid.txt").read_text().splitlines()
    yield from strange_texts(vocabulary, 10**9)


def test_no_unit_of_100_000_changes(real: tuple[Vocabulary, int], tmp_path: Path) -> None:
    vocabulary, size = real
    plan = some_plan(vocabulary, size)
    pruned, source = write(vocabulary, plan, tmp_path), texts(vocabulary)
    checked, number, seen = 0, 0, set[str]()
    while checked < UNITS:
        batch = list(islice(source, 20_000))
        found, broken = broken_units(vocabulary, pruned, plan, batch, seen)
        assert broken == []
        assert texts_that_change(vocabulary, pruned, batch) == []
        checked, number = checked + found, number + len(batch)
    print(f"\n{vocabulary.kind}: {checked} units of {number} texts, all as before")


def test_without_closure_units_change(real: tuple[Vocabulary, int], tmp_path: Path) -> None:
    vocabulary, size = real
    plan = unclosed_plan(vocabulary, size)
    pruned = write_unchecked(vocabulary, plan, tmp_path)
    sample = list(islice(texts(vocabulary), 20_000))
    checked, broken = broken_units(vocabulary, pruned, plan, sample)
    print(f"\n{vocabulary.kind}: not closed, {len(broken)} of {checked} units changed")
    assert broken


def test_every_kept_token_can_be_produced(real: tuple[Vocabulary, int], tmp_path: Path) -> None:
    vocabulary, size = real
    plan = some_plan(vocabulary, size)
    pruned = write(vocabulary, plan, tmp_path)
    assert pruned.forest.dead <= {
        plan.new_ids[id] for id in vocabulary.forest.dead & set(plan.kept)
    }
    assert pruned.forest.unreachable(set(range(size))) == set()
    print(f"\n{vocabulary.kind}: {len(pruned.forest.dead)} of {size} dead")


@pytest.mark.skipif(not FILES["llama2"][0].exists(), reason="no Llama-2 model")
def test_fast_and_sentencepiece_forms_of_llama2_agree_as_before(tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    (folder := tmp_path / "source").mkdir()
    (folder / "tokenizer.model").write_bytes(FILES["llama2"][0].read_bytes())
    LlamaTokenizer.from_pretrained(str(folder)).save_pretrained(str(folder))
    fast, slow = open_vocabulary(folder), open_vocabulary(folder / "tokenizer.model")
    pruned = write(fast, some_plan(fast, FILES["llama2"][1]), tmp_path / "pruned")
    pruned_slow = open_vocabulary(tmp_path / "pruned/tokenizer.model")
    # not what differs before: special tokens by name, a space at the start
    sample = [text.strip() for text in islice(texts(slow), 6000) if "<" not in text]
    sample += [f"x{' ' * runs}y" for runs in range(1, 99)]
    before = [text for text in sample if fast.encode([text]) != slow.encode([text])]
    after = [text for text in sample if pruned.encode([text]) != pruned_slow.encode([text])]
    print(f"\n{len(sample)} texts: {len(before)} differ, {len(after)} after pruning")
    assert fast.forest.mandatory[268] == "other form"  # four spaces
    assert len(before) < len(sample) / 10
    assert set(after) <= set(before) and pruned.digest == pruned_slow.digest


@pytest.mark.skipif(not FILES["smollm2"][0].is_dir(), reason="no SmolLM2")
def test_a_real_chat_template_renders_to_the_mapped_ids(tmp_path: Path) -> None:
    source = open_vocabulary(FILES["smollm2"][0])
    messages = [{"role": "user", "content": "Why is the naïve café closed? 你好\n\n  x = 1"}]
    text = transformers_tokenizer(source.path).apply_chat_template(messages, tokenize=False)
    old = source.encode([text])[0]
    plan = plan_of(source, source.forest.closure(old) | source.forest.required)
    source.write(plan, tmp_path)
    pruned = transformers_tokenizer(tmp_path)
    assert pruned.apply_chat_template(messages, tokenize=False) == text
    ids = pruned.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == [plan.new_ids[id] for id in old] and pruned.eos_token_id in ids


@pytest.mark.skipif(not FILES["qwen"][0].exists(), reason="no Qwen ranks")
@pytest.mark.skipif(not (DATA / "qwen.30k.tiktoken").is_file(), reason="no broken Qwen ranks")
def test_broken_ranks_work_again_given_their_source(tmp_path: Path) -> None:
    vocabulary = open_vocabulary(FILES["qwen"][0])
    broken = read_ranks(DATA / "qwen.30k.tiktoken")
    kept = {vocabulary.ranks[token] for token in broken}  # type: ignore[attr-defined]
    forest = vocabulary.forest
    plan = plan_of(vocabulary, forest.closure(kept) | forest.required)
    mended = write(vocabulary, plan, tmp_path)
    sample = list(chain(prose(), strange_texts(vocabulary, 5000)))
    assert texts_that_change(vocabulary, mended, sample) == []
    assert broken_units(vocabulary, mended, plan, sample)[1] == []
    print(f"\n{len(broken)} ranks, {plan.size} tokens with their parts, bytes and specials")
