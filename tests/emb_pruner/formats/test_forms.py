"""One pruned vocabulary in several forms: they agree, load everywhere, and keep their roles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from emb_pruner.formats import Vocabulary, open_vocabulary
from emb_pruner.formats.json_writing import pruned_document
from emb_pruner.formats.sentencepiece import UNUSED, read_model
from megatron_prune.data.tokenizers import load_tokenizer, transformers_tokenizer
from tests.emb_pruner.formats.conftest import TEMPLATE, make, prose
from tests.emb_pruner.formats.promises import (
    plan_of,
    some_plan,
    strange_texts,
    write,
    write_unchecked,
)

SIZE = 640
MESSAGES = [
    {"role": "user", "content": "Why is the naïve café closed? 你好"},
    {"role": "assistant", "content": "It is not </s> closed.\n"},
]


def disagreements(left: Any, right: Any, texts: list[str]) -> set[str]:
    return {text for text in texts if left.encode([text]) != right.encode([text])}


def sample(vocabulary: Vocabulary) -> list[str]:
    return [*prose(), *strange_texts(vocabulary, 1000)]


def test_ranks_and_tokenizer_json_agree(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    ranks = make("tiktoken", tmp_path)
    for name, plan in (
        ("all", plan_of(ranks, range(ranks.forest.size))),
        ("some", some_plan(ranks, SIZE)),
    ):
        pruned = write(ranks, plan, tmp_path / name)
        as_json = open_vocabulary(tmp_path / name / "tokenizer.json")
        assert as_json.kind == "tokenizers BPE" and as_json.digest == pruned.digest
        assert disagreements(pruned, as_json, sample(ranks)) == set()


def test_sentencepiece_and_fast_form_agree_where_the_originals_do(tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    fast = make("llama", source)
    slow = open_vocabulary(source / "tokenizer.model")
    (source / "tokenizer.model.v3").write_bytes((source / "tokenizer.model").read_bytes())
    pruned = write(fast, some_plan(fast, SIZE), tmp_path / "pruned")
    pruned_slow = open_vocabulary(tmp_path / "pruned/tokenizer.model")
    texts = [text for text in sample(fast) if "<" not in text]  # SentencePiece finds no specials
    assert pruned_slow.digest == pruned.digest
    mistrals = (tmp_path / "pruned/tokenizer.model.v3").read_bytes()
    assert mistrals == (tmp_path / "pruned/tokenizer.model").read_bytes()
    agreed = set(texts) - disagreements(slow, fast, texts)
    assert len(agreed) > 1000
    assert disagreements(pruned_slow, pruned, texts) & agreed == set()


def test_without_a_character_the_two_forms_disagree(tmp_path: Path) -> None:
    """SentencePiece merges characters that it has no piece for, `tokenizers` cannot."""
    (folder := tmp_path / "source").mkdir()
    fast = make("llama", folder)
    alone = open_vocabulary(folder / "tokenizer.model")
    letter = fast.ids["k"]  # type: ignore[attr-defined]
    assert fast.forest.mandatory[letter] == alone.forest.mandatory[letter] == "character"
    (bare := tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert open_vocabulary(bare).forest.mandatory[letter] == "character"
    plan = plan_of(fast, set(range(fast.forest.size)) - {letter})
    pruned = write_unchecked(fast, plan, tmp_path / "pruned")
    slow = open_vocabulary(tmp_path / "pruned/tokenizer.model")
    assert disagreements(slow, pruned, prose())


def test_a_directory_keeps_what_its_sentencepiece_form_needs(tmp_path: Path) -> None:
    fast = make("llama", tmp_path)
    long = next(id for id in range(500, 700) if len(fast.token(id)) > 2)
    assert long not in fast.forest.mandatory
    proto = read_model(tmp_path / "tokenizer.model")
    proto.pieces[long].type = UNUSED
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    assert open_vocabulary(tmp_path).forest.mandatory[long] == "unused"


@pytest.mark.parametrize("name", ["tokenizers BPE", "llama", "tiktoken"])
def test_what_is_written_loads_with_autotokenizer(name: str, tmp_path: Path) -> None:
    (folder := tmp_path / "source").mkdir()
    source = make(name, folder)
    pruned = write(source, some_plan(source, SIZE), tmp_path / "pruned")
    loaded = load_tokenizer(tmp_path / "pruned")
    texts = sample(source)[:300]
    assert loaded.vocab_size == SIZE and loaded.eod is not None
    assert loaded.encode_batch(texts, add_special_tokens=False) == pruned.encode(texts)


def test_chat_templates_render_to_the_mapped_ids(tmp_path: Path) -> None:
    (folder := tmp_path / "source").mkdir()
    source = make("tokenizers BPE", folder)
    loaded = transformers_tokenizer(folder)
    wanted = loaded.apply_chat_template(MESSAGES, tokenize=False)
    old = source.encode([wanted])[0]
    plan = plan_of(source, source.forest.closure(old) | source.forest.required)
    write(source, plan, tmp_path / "pruned")
    pruned = transformers_tokenizer(tmp_path / "pruned")
    assert (tmp_path / "pruned/chat_template.jinja").read_text() == TEMPLATE
    assert pruned.apply_chat_template(MESSAGES, tokenize=False) == wanted
    ids = pruned.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert ids == [plan.new_ids[id] for id in old]
    assert ids.count(pruned.eos_token_id) == 3 and loaded.eos_token_id in old


def test_older_files_of_a_directory_get_the_same_ids(tmp_path: Path) -> None:
    (folder := tmp_path / "source").mkdir()
    source = make("tokenizers BPE", folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(document["model"]["vocab"]))
    merges = [" ".join(pair) for pair in document["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "added_tokens.json").write_text(json.dumps({"<s>": 0, "</s>": 1}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    token = {"content": "</s>", "special": True}
    config |= {"added_tokens_decoder": {"1": token}, "pad_token_id": 1}
    config |= {"eos_token_id": [1, source.forest.size - 1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    kept = source.forest.required | source.forest.closure([source.forest.size - 1])
    plan = plan_of(source, kept)
    names = source.write(plan, tmp_path)
    assert {"vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json"} <= set(names)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    assert json.loads((tmp_path / "vocab.json").read_text()) == written["model"]["vocab"]
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"<s>": 0, "</s>": 1}
    lines = (tmp_path / "merges.txt").read_text().split("\n")
    assert lines == ["#version: 0.2", *map(" ".join, written["model"]["merges"]), ""]
    new = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert new["added_tokens_decoder"] == {"1": token} and new["pad_token_id"] == 1
    assert new["eos_token_id"] == [1, plan.size - 1]


def test_a_directory_without_tokenizer_json_is_read_as_transformers_does(tmp_path: Path) -> None:
    (folder := tmp_path / "source").mkdir()
    make("llama", folder)
    (folder / "tokenizer.json").unlink()
    source = open_vocabulary(folder)
    names = source.write(some_plan(source, SIZE), tmp_path)
    assert "tokenizer.json" not in names and "tokenizer.model" in names
    pruned, texts = open_vocabulary(tmp_path), sample(source)
    assert pruned.forest.size == SIZE
    for text, ids in zip(texts, pruned.encode(texts)):
        assert pruned.decode(ids) == source.decode(source.encode([text])[0])


CLS, SEP = ("[CLS]", 3), ("[SEP]", 4)


def moved(template: Any, tmp_path: Path) -> Any:
    """The post-processor after every id moves down by one: token 2, a merged one, is dropped."""
    vocab = {"a": 0, "b": 1, "ab": 2, "[CLS]": 3, "[SEP]": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    tokenizer.post_processor = template
    tokenizer.enable_padding(pad_id=4, pad_token="[SEP]")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = open_vocabulary(tmp_path / "tokenizer.json")
    source.write(plan_of(source, [0, 1, 3, 4]), tmp_path / "pruned")
    return Tokenizer.from_file(str(tmp_path / "pruned/tokenizer.json"))


@pytest.mark.parametrize(
    "template",
    [
        processors.TemplateProcessing(
            "[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
        ),
        processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3)),
        processors.RobertaProcessing(("[SEP]", 4), ("[CLS]", 3)),
        processors.Sequence(
            [processors.ByteLevel(), processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3))]
        ),
    ],
)
def test_post_processors_and_padding_are_renumbered(template: Any, tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    tokenizer = moved(template, tmp_path)
    assert [tokenizer.encode(text).ids for text in ("ab", "[SEP]")] == [[2, 0, 1, 3], [2, 3, 3]]
    padded = tokenizer.encode_batch(["ab", "b"])[1]
    assert padded.ids == [2, 1, 3, 3] and tokenizer.padding["pad_id"] == 3


def test_tokens_found_whole_are_kept_without_parts(tmp_path: Path) -> None:
    letters = {letter: id for id, letter in enumerate("abcd")}
    vocab = {**letters, "ab": 4, "abcd": 5, "cd": 6}
    merges = [("a", "b")]
    for whole in (True, False):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        source = open_vocabulary(tmp_path / "tokenizer.json")
        assert source.forest.parts[4] == (0, 1) and source.forest.parts[5] is None
        assert source.forest.dead == (set() if whole else {5, 6})
        document = pruned_document(source.document, source.ids, plan_of(source, [0, 1, 2, 3, 5]))
        pruned = Tokenizer.from_str(json.dumps(document))
        assert pruned.encode("abcd ab").ids == ([4, 0, 1] if whole else [0, 1, 2, 3, 0, 1])


def test_qwens_own_code_gets_the_new_first_special_and_is_not_run(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    (folder := tmp_path / "source").mkdir()
    make("tiktoken", folder)
    code = "SPECIAL_START_ID = 992\nraise SystemExit('run')\n"
    (folder / "tokenization_qwen.py").write_text(code)
    auto = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    config = {"tokenizer_class": "QWenTokenizer", "auto_map": auto, "model_max_length": 8192}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    source = open_vocabulary(folder)
    plan = some_plan(source, SIZE)
    source.write(plan, tmp_path)
    start = SIZE - 208
    assert (tmp_path / "tokenization_qwen.py").read_text() == code.replace("992", str(start))
    assert load_tokenizer(tmp_path).eod == start
    assert transformers_tokenizer(tmp_path).model_max_length == 8192
    assert open_vocabulary(tmp_path).forest.size == SIZE
