"""Pieces encode to what the whole encodes to, for every tokenizer that is cut."""

from __future__ import annotations

import json
import random
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, trainers
from tokenizers import pre_tokenizers as splitters

from emb_pruner import cutting
from emb_pruner.cutting import Cutter, of_sentencepiece, of_tiktoken, of_tokenizer_json

# What the borders of words are made of: blanks of all kinds, marks, digits, accents alone and
# composed, letters of several scripts, half a special token, ▁ itself.
ATOMS = [
    *"abcXYZ159.,;!?'_-/()\"\n\t  \r\x00\x1c\x85\u00a0\u2028\u3000▁é你好д²½ⅷ٣🙂\u0301\u200d\u212b",
    *(
        " the",
        "the ",
        " and",
        "don't",
        " it's",
        "\r\n",
        "\n\n",
        "    ",
        "  ",
        " 12",
        "self.x(",
        "<",
    ),
    *(
        "<|end",
        "<|end|>",
        "|>",
        "foo_bar",
        "naïve",
        " 'll",
        "\n    return",
        "//\n",
        " (",
        "e\u0301",
    ),
]
GPT2 = min(cutting.PATTERNS, key=len)
LLAMA3, QWEN, O200K, TEKKEN = (
    next(p for p in sorted(cutting.PATTERNS) if has(p))
    for has in (
        lambda p: "{1,3}" in p and "Lu" not in p,
        lambda p: "{1,3}" not in p and "Lu" not in p and "[\\r\\n]+" in p,
        lambda p: "{1,3}" in p and "Lu" in p,
        lambda p: "{1,3}" not in p and "Lu" in p,
    )
)


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ATOMS, k=rng.randrange(30))) for _ in range(count)]


def trained(
    splitter: Any = None, normalizer: Any = None, added: Any = (), size: int = 900, **bpe: Any
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**bpe))
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    words = splitters.ByteLevel.alphabet() if "unk_token" not in bpe else []
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>"] if "unk_token" in bpe else [],
        initial_alphabet=words,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(3000, seed=1), trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def byte_level(*steps: Any, regex: bool = False) -> Any:
    return splitters.Sequence(
        [*steps, splitters.ByteLevel(add_prefix_space=False, use_regex=regex)]
    )


def split(pattern: str) -> Any:
    return splitters.Split(Regex(pattern), "isolated")


END = AddedToken("<|end|>", special=True, normalized=False)
BYTE_LEVEL: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: trained(byte_level(regex=True), added=[END]),
    "digits": lambda: trained(byte_level(splitters.Digits(True), regex=True), added=[END]),
    "digits in groups": lambda: trained(byte_level(splitters.Digits(False), regex=True)),
    "llama3": lambda: trained(byte_level(split(LLAMA3)), added=[END], ignore_merges=True),
    "qwen": lambda: trained(byte_level(split(QWEN)), normalizers.NFC(), added=[END]),
    "o200k": lambda: trained(byte_level(split(O200K))),
    "tekken": lambda: trained(byte_level(split(TEKKEN))),
}
REPLACE = normalizers.Replace(" ", "▁")


def without_words_inside(tokenizer: Tokenizer) -> Tokenizer:
    """Without the merges that reach over the start of a word, as training on words leaves them."""
    document = json.loads(tokenizer.to_str())
    model = document["model"]
    inside = {token for token in model["vocab"] if re.search("[^▁]▁", token)}
    model["merges"] = [pair for pair in model["merges"] if not inside & {*pair, "".join(pair)}]
    kept = [token for token in model["vocab"] if token not in inside]
    model["vocab"] = {token: id for id, token in enumerate(kept)}
    return Tokenizer.from_str(json.dumps(document))


def words(splitter: Any, normalizer: Any = None) -> Tokenizer:
    model = {"unk_token": "<unk>", "fuse_unk": True}
    found = without_words_inside(trained(splitter, normalizer, **model))
    found.add_tokens([END])
    return found


WORDS: dict[str, Callable[[], Tokenizer]] = {
    "llama2": lambda: words(None, normalizers.Sequence([normalizers.Prepend("▁"), REPLACE])),
    "gemma": lambda: words(None, REPLACE),
    "metaspace first": lambda: words(splitters.Metaspace(prepend_scheme="first", split=False)),
    "metaspace always": lambda: words(splitters.Metaspace(prepend_scheme="always", split=False)),
    "metaspace never": lambda: words(splitters.Metaspace(prepend_scheme="never", split=True)),
}


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def differing(cutter: Cutter, ids: Callable[[str], list[int]], count: int) -> tuple[int, int]:
    """How many texts encode otherwise in pieces or in blocks; how many are cut at all."""
    wrong = cut = 0
    for text in texts(count):
        pieces = cutter.pieces(text)
        cut += len(pieces) > 1
        wrong += [id for piece in pieces for id in ids(piece)] != ids(text)
        if (at := cutter.last_border(text)) is not None:
            left, right = at
            wrong += ids(text[:left]) + ids(text[right:]) != ids(text)
    return wrong, cut


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *WORDS])
def test_pieces_and_blocks_encode_to_what_the_whole_does(name: str) -> None:
    tokenizer = (BYTE_LEVEL | WORDS)[name]()
    cutter = of_tokenizer_json(json.loads(tokenizer.to_str()))
    wrong, cut = differing(cutter, lambda text: encode(tokenizer, text), 4000)
    assert wrong == 0 and cut > 1500


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_units_are_single_pieces_spelled_out(name: str) -> None:
    tokenizer = BYTE_LEVEL[name]()
    cutter = of_tokenizer_json(json.loads(tokenizer.to_str()))
    assert cutter.unit is not None
    found = {piece for text in texts(4000) for piece in cutter.pieces(text)}
    units = [piece for piece in found if cutter.unit.fullmatch(piece)]
    assert len(units) > 30
    for unit in units:
        ids = [token.id for token in tokenizer.model.tokenize(unit.replace(" ", "Ġ"))]
        assert ids == encode(tokenizer, unit)
    tokenizer.add_tokens(["foo"])
    assert of_tokenizer_json(json.loads(tokenizer.to_str())).unit is None


@pytest.mark.parametrize("dummy", [True, False])
def test_sentencepiece_bpe_likewise(dummy: bool, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\x00", "") for text in texts(3000, seed=1)),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy,
        user_defined_symbols=["<|end|>"],
        minloglevel=2,
    )
    data = (tmp_path / "m.model").read_bytes()
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(data)
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    wrong, cut = differing(of_sentencepiece(model), processor.encode, 4000)
    assert wrong == 0 and cut > 1500
    model.trainer_spec.model_type = 1
    assert of_sentencepiece(model) == cutting.WHOLE


def test_the_same_cuts_are_wrong_for_another_pattern() -> None:
    """The control: words that take the space after them."""
    tokenizer = trained(byte_level(split(r"\p{L}+ ?|[^\p{L}]+")))
    cutter = cutting.of_tiktoken(GPT2, [])
    assert differing(cutter, lambda text: encode(tokenizer, text), 300)[0] > 100
    assert of_tokenizer_json(json.loads(tokenizer.to_str())) == cutting.WHOLE


def test_words_are_wrong_for_a_vocabulary_that_crosses_them() -> None:
    tokenizer = trained(None, REPLACE, unk_token="<unk>", fuse_unk=True)
    allowed = of_tokenizer_json(json.loads(words(None, REPLACE).to_str()))
    assert differing(allowed, lambda text: encode(tokenizer, text), 1000)[0] > 10
    assert of_tokenizer_json(json.loads(tokenizer.to_str())) == cutting.WHOLE


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"rstrip": True},
        {"lstrip": True},
        {"single_word": True},
        {"content": "an end"},
        {"normalizer": {"type": "NFC"}, "normalized": True, "content": "<|KEY|>"},
    ],
    ids=str,
)
def test_what_is_not_known_is_not_cut(change: dict[str, Any]) -> None:
    document = json.loads(BYTE_LEVEL["gpt2"]().to_str())
    assert of_tokenizer_json(document) != cutting.WHOLE
    for key, value in change.items():
        (document if key in document else document["added_tokens"][0])[key] = value
    assert of_tokenizer_json(document) == cutting.WHOLE


def test_tiktoken_is_cut_by_its_pattern() -> None:
    assert of_tiktoken(LLAMA3, ["<|end|>"]).pieces("a b<|end|> c") == ["a b<|end|> c"]
    assert of_tiktoken(LLAMA3, []).pieces("a foo.b1 c'd\n  x") == [
        "a",
        " foo",
        ".b1",
        " c'd\n ",
        " x",
    ]
    assert of_tiktoken(LLAMA3 + "|x", []) == of_tiktoken(LLAMA3, ["an end"]) == cutting.WHOLE


def test_pieces_join_to_the_text_and_are_short() -> None:
    cutter = of_tiktoken(GPT2, [])
    for text in texts(2000):
        assert "".join(cutter.pieces(text)) == text
    prose = "It was the best of times, it was (in 1859) the worst of times;\n" * 3
    assert max(map(len, cutter.pieces(prose))) <= 7


def test_a_border_is_found_from_afar_and_not_beside_added_tokens() -> None:
    cutter = of_tokenizer_json(json.loads(WORDS["llama2"]().to_str()))
    text = "ab cd<|end|> e<|end|> <|end|>" + "x" * 100_000
    assert cutter.last_border(text) == (2, 3)
    assert cutter.last_border("x" * 100_000) is None


def test_normalising_makes_no_other_ascii() -> None:
    made = {
        letter
        for number in range(0x80, sys.maxunicode + 1)
        for letter in unicodedata.normalize("NFC", chr(number))
        if letter.isascii()
    }
    assert made == set("K;`")


def test_pythons_classes_lie_within_those_of_the_patterns() -> None:
    """A cut needs Python's not-a-space to be one for the tokenizers, too."""
    spaces = regex.findall(r"\p{White_Space}", "".join(map(chr, range(sys.maxunicode + 1))))
    assert len(spaces) > 20 and all(map(str.isspace, spaces))
