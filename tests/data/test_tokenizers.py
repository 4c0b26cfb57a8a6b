from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.errors import ConfigError, DamagedError, PruneError


@pytest.mark.parametrize("special", [True, False])
def test_ids_and_text_of_a_directory_are_those_of_transformers(
    bpe: Path, texts: list[str], special: bool
) -> None:
    ours, theirs = load_tokenizer(bpe), AutoTokenizer.from_pretrained(bpe)
    for text in [*texts, ""]:
        ids = theirs(text, add_special_tokens=special).input_ids
        assert ours.encode(text, special) == ids
        assert ours.decode(ids[1:]) == theirs.decode(ids[1:], clean_up_tokenization_spaces=False)
    assert ours.vocab_size == len(theirs)
    assert ours.eod == theirs.eos_token_id


def test_default_special_tokens_are_added_only_when_asked(bpe: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    shutil.copytree(bpe, tmp_path / "bos")
    tokenizer = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(tmp_path / "bos" / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "bos")
    plain = load_tokenizer(bpe).encode("brown fox", False)
    assert ours.encode("brown fox", False) == plain
    assert ours.encode("brown fox", True) == [0, *plain]
    assert AutoTokenizer.from_pretrained(tmp_path / "bos")("brown fox").input_ids == [0, *plain]


def test_decoding_does_not_clean_up_spaces(bpe: Path, tmp_path: Path) -> None:
    shutil.copytree(bpe, tmp_path / "cleaning")
    file = tmp_path / "cleaning" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"clean_up_tokenization_spaces": True}))
    ours = load_tokenizer(tmp_path / "cleaning")
    text = "a fox , a dog . it 's </s>  two"
    assert ours.decode(ours.encode(text, False)) == text


def test_truncation_and_padding_in_the_file_are_not_applied(bpe: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox jumps"
    wanted = load_tokenizer(bpe).encode(text, False)
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(text, False) == wanted


def test_a_tokenizer_that_is_more_than_its_backend_is_left_to_transformers(
    bpe: Path, tmp_path: Path
) -> None:
    shutil.copytree(bpe, tmp_path / "splits")
    file = tmp_path / "splits" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"split_special_tokens": True}))
    ours, theirs = load_tokenizer(tmp_path / "splits"), AutoTokenizer.from_pretrained(file.parent)
    text = "end </s> of text"
    assert theirs(text).input_ids != load_tokenizer(bpe).encode(text, True), "no difference to see"
    assert ours.encode(text, True) == theirs(text).input_ids
    assert pickle.loads(pickle.dumps(ours)).encode(text, True) == theirs(text).input_ids
    assert ours.encode_batch([], True) == []


def test_such_a_tokenizer_does_not_clean_up_spaces_either(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"fox": 0, ",": 1, "</s>": 2}, unk_token="fox"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="</s>",
        clean_up_tokenization_spaces=True,
        split_special_tokens=True,
    )
    wrapped.save_pretrained(tmp_path)
    assert wrapped.decode([0, 1, 0]) == "fox, fox", "no difference to see"
    assert load_tokenizer(tmp_path).decode([0, 1, 0]) == "fox , fox"


def test_the_unknown_token_is_found_in_every_kind_of_file(
    bpe: Path, spm: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models

    assert load_tokenizer(bpe).unknown is None
    assert load_tokenizer(spm).unknown == 0
    kinds = {
        "words": models.WordLevel({"a": 0, "[UNK]": 1, "None": 2}, unk_token="[UNK]"),
        "pieces": models.Unigram([("a", -1.0), ("<unk>", 0.0)], unk_id=1),
        "none": models.BPE({"a": 0, "None": 1}, []),
    }
    for name, model in kinds.items():
        Tokenizer(model).save(str(tmp_path / f"{name}.json"))
        found = load_tokenizer(tmp_path / f"{name}.json").unknown
        assert found == (None if name == "none" else 1), name


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_a_pickled_tokenizer_does_the_same(
    kind: str, texts: list[str], request: pytest.FixtureRequest
) -> None:
    ours = load_tokenizer(request.getfixturevalue(kind))
    copy = pickle.loads(pickle.dumps(ours))
    assert copy.encode_batch(texts, True) == ours.encode_batch(texts, True)
    assert (copy.digest, copy.eod, copy.vocab_size) == (ours.digest, ours.eod, ours.vocab_size)


def test_ids_of_a_sentencepiece_file_are_sentencepiece_s_with_bos(
    spm: Path, texts: list[str]
) -> None:
    ours, theirs = load_tokenizer(spm), SentencePieceProcessor(model_file=str(spm))
    for text in texts:
        assert ours.encode(text, False) == theirs.encode(text)
        assert ours.encode(text, True) == [theirs.bos_id(), *theirs.encode(text)]
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
    assert (ours.vocab_size, ours.eod) == (340, theirs.eos_id())


def test_a_directory_with_only_a_sentencepiece_file_is_that_file(spm: Path) -> None:
    assert load_tokenizer(spm.parent).digest == load_tokenizer(spm).digest


@pytest.mark.parametrize("place", ["iter_0000012", "release"])
def test_a_megatron_checkpoint_carries_its_tokenizer(bpe: Path, tmp_path: Path, place: str) -> None:
    shutil.copytree(bpe, tmp_path / place / "hf")
    word = "release" if place == "release" else "12"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(f"{word}\n")
    for path in (tmp_path, tmp_path / place):
        assert load_tokenizer(path).digest == load_tokenizer(bpe).digest
        assert load_tokenizer(path).eod == 1


def test_the_digest_is_of_what_ids_mean_not_of_files(bpe: Path, spm: Path, tmp_path: Path) -> None:
    alone = load_tokenizer(bpe / "tokenizer.json")
    shutil.copy(bpe / "tokenizer.json", tmp_path / "tokenizer.json")
    bare = load_tokenizer(tmp_path / "tokenizer.json")
    assert alone.digest == bare.digest == load_tokenizer(bpe).digest
    assert (alone.eod, bare.eod) == (1, None)
    (tmp_path / "llama").mkdir()
    shutil.copy(spm, tmp_path / "llama" / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path / "llama").digest == load_tokenizer(spm).digest


def test_the_digest_notices_two_tokens_that_changed_places(bpe: Path, tmp_path: Path) -> None:
    content = json.loads((bpe / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    swapped = load_tokenizer(tmp_path / "tokenizer.json")
    assert swapped.vocab_size == load_tokenizer(bpe).vocab_size
    assert swapped.digest != load_tokenizer(bpe).digest


def test_what_is_not_a_tokenizer_is_refused(tmp_path: Path, bpe: Path, spm: Path) -> None:
    (tmp_path / "readme.txt").write_text("words")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "latest_checkpointed_iteration.txt").write_text("7")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "latest_checkpointed_iteration.txt").write_text("../../etc")
    for name, needle in (
        ("nowhere", "no such file"),
        ("readme.txt", "wanted a tokenizer.json"),
        ("empty", "no tokenizer files"),
        ("bare", "iter_0000007/hf"),
        ("odd", "wanted an iteration number"),
    ):
        with pytest.raises(ConfigError, match=needle) as caught:
            load_tokenizer(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("plan.json", b'{"version": 1, "kept": {}}', "no tokenizer.json"),
        ("vocab.json", b'{"a": 0}', "no tokenizer.json"),
        ("a.json", b"[1]", "no tokenizer.json"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("tokenizer.model", b"<!DOCTYPE html>", "web page"),
    ],
)
def test_what_is_no_tokenizer_is_no_damaged_one(
    name: str, data: bytes, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=says) as caught:
        load_tokenizer(tmp_path / name)
    assert "copy it again" not in str(caught.value)


def test_code_of_a_model_s_author_is_never_run(bpe: Path, tmp_path: Path) -> None:
    shutil.copytree(bpe, tmp_path / "evil")
    canary = tmp_path / "canary"
    (tmp_path / "evil" / "tokenizer.json").unlink()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    (tmp_path / "evil" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    with pytest.raises(PruneError, match=r"tokenizer .*evil"):
        load_tokenizer(tmp_path / "evil")
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["tokenizer.json", "directory", "tokenizer.model"])
def test_a_truncated_file_is_damaged(bpe: Path, spm: Path, tmp_path: Path, kind: str) -> None:
    if kind == "directory":
        path = shutil.copytree(bpe, tmp_path / "cut")
        file = path / "tokenizer.json"
    else:
        path = file = tmp_path / kind
        shutil.copy(spm if kind == "tokenizer.model" else bpe / "tokenizer.json", file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DamagedError, match=r"cut|tokenizer"):
        load_tokenizer(path)
    file.write_bytes(b"")
    with pytest.raises(DamagedError):
        load_tokenizer(path)


def test_real_llama_2(texts: list[str]) -> None:
    folder = os.environ.get("MEGATRON_PRUNE_DATA", "")
    path = Path(folder) / "llama2.tokenizer.model"
    if not folder or not path.is_file():
        pytest.skip("MEGATRON_PRUNE_DATA does not name a folder with llama2.tokenizer.model")
    ours = load_tokenizer(path)
    assert (ours.vocab_size, ours.eod) == (32000, 2)
    assert ours.encode("Hello world", True) == [1, 15043, 3186]
    assert ours.decode([15043, 3186]) == "Hello world"
