"""``megatron-prune vocab plan`` from outside, and what it says of text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from emb_pruner.formats import Vocabulary, open_vocabulary
from emb_pruner.judging import judge
from emb_pruner.planning import make_vocab_plan
from emb_pruner.selection import METHODS
from emb_pruner.vocab_plan import VocabPlan, load_vocab_plan
from tests.data.conftest import write_bpe
from tests.emb_pruner.formats.conftest import FORMATS, prose
from tests.emb_pruner.test_counting import documents
from tests.pico import ok, refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planning")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Path:
    return write_bpe(folder / "tokenizer", "\n".join(documents(200)), vocab_size=700)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Path) -> Vocabulary:
    return open_vocabulary(tokenizer)


@pytest.fixture(scope="module")
def held_out(folder: Path) -> Path:
    path = folder / "held_out.txt"
    path.write_text("\n".join(documents(40, seed=7)))
    return path


@pytest.fixture(scope="module")
def counts(folder: Path, tokenizer: Path) -> Path:
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(documents(60, seed=3)))
    path = folder / "counts.npz"
    ok("vocab", "count", "--tokenizer", tokenizer, "--input", corpus, "--save", path)
    return path


def words(tokenizer: Path, save: Path, *more: object) -> tuple[object, ...]:
    return ("vocab", "plan", "--tokenizer", tokenizer, "--save", save, *more)


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_is_what_was_asked_for(
    tmp_path: Path,
    tokenizer: Path,
    vocabulary: Vocabulary,
    counts: Path,
    held_out: Path,
    method: str,
) -> None:
    save = tmp_path / "plan.json"
    flags = ("--counts", counts, "--vocab-size-remain", 512, "--balance-for", 2, "--held-out",
             held_out, "--json", "--method", method)  # fmt: skip
    report = json.loads(ok(*words(tokenizer, save, *flags)).out)
    plan = load_vocab_plan(save)
    assert plan.size == report["kept"] == 512 and plan.method == method and plan.balance_for == 2
    assert plan.tokenizer_digest == vocabulary.digest
    assert vocabulary.forest.unreachable(set(plan.kept)) == set()
    assert set(vocabulary.forest.mandatory) <= set(plan.kept)
    assert sum(plan.reasons.values()) == 512
    mandatory = sum(plan.reasons[why] for why in set(vocabulary.forest.mandatory.values()))
    assert mandatory == len(vocabulary.forest.mandatory)
    assert report["dead"] == []
    (judged,) = report["held_out"].values()
    text = held_out.read_bytes().decode()
    (ids,) = vocabulary.encode([text])
    assert judged["tokens_before"] == len(ids) and judged["changed_though_kept"] == 0
    folder = tmp_path / "pruned"
    folder.mkdir()
    vocabulary.write(plan, folder)
    assert judged["tokens_after"] == len(open_vocabulary(folder).encode([text])[0])
    assert judged["fertility"] > 1 and 0 < judged["identical_units"] < 1


@pytest.mark.parametrize("form", FORMATS)
def test_every_form_is_judged_in_itself(tmp_path: Path, form: str) -> None:
    """A file by any name; and ranks, beside which a tokenizer.json is written."""
    (tmp_path / "source").mkdir()
    source = FORMATS[form](tmp_path / "source")
    if source.is_file():
        source = source.rename(source.with_name(f"my.{source.name}"))
    text = "".join(prose())
    (tmp_path / "held_out.txt").write_text(text)
    flags = ("--vocab-size-remain", 640, "--held-out", tmp_path / "held_out.txt", "--json")
    report = json.loads(ok(*words(source, tmp_path / "plan.json", *flags)).out)
    (judged,) = report["held_out"].values()
    assert report["dead"] == [] and judged["changed_though_kept"] == 0
    vocabulary, folder = open_vocabulary(source), tmp_path / "pruned"
    folder.mkdir()
    vocabulary.write(load_vocab_plan(tmp_path / "plan.json"), folder)
    pruned = open_vocabulary(vocabulary.written(folder))
    assert pruned.kind == vocabulary.kind == report["kind"] and pruned.size == 640
    assert judged["tokens_after"] == len(pruned.encode([text])[0])
    assert judged["tokens_before"] == len(vocabulary.encode([text])[0])
    lowest = 0.0 if "Unigram" in form else 0.2  # a unit there may be the whole text
    assert lowest <= judged["identical_units"] < 1


def test_handing_counts_on_makes_the_fewest_tokens_of_what_was_counted(
    vocabulary: Vocabulary, counts: Path, tmp_path: Path
) -> None:
    text, found = "\n".join(documents(60, seed=3)), {}
    for method in METHODS:
        plan = make_vocab_plan(vocabulary, 512, counts=counts, method=method, prior=0)
        (tmp_path / method).mkdir()
        vocabulary.write(plan, tmp_path / method)
        pruned = open_vocabulary(tmp_path / method)
        found[method] = judge(vocabulary, pruned, plan, [text]).tokens_after
    assert min(found.values()) == found["leaf-fertility"] < found["prefix"]


def test_without_counts_the_earliest_stay(tokenizer: Path, tmp_path: Path) -> None:
    said = ok(*words(tokenizer, tmp_path / "plan.json", "--vocab-size-remain", 512)).out
    assert "512 of 700 tokens stay, chosen by prefix" in said and "dead tokens 0" in said


def test_tokens_that_are_asked_for_stay(
    tokenizer: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    size, last = ("--vocab-size-remain", 512), vocabulary.forest.size - 1
    plain = make_vocab_plan(vocabulary, 512)
    (latest,) = vocabulary.encode([vocabulary.decode([last])])
    assert latest == [last] and last not in plain.kept
    wanted, save = tmp_path / "keep.txt", tmp_path / "plan.json"
    for spelled in (vocabulary.token(last), vocabulary.decode([last])):
        wanted.write_text(f"{spelled}\n\n<s>\n")
        ok(*words(tokenizer, save, *size, "--keep-file", wanted, "--overwrite"))
        plan = load_vocab_plan(save)
        assert last in plan.kept and plan.size == 512 and plan.reasons["asked for"] == 1
    wanted.write_text(f"{vocabulary.token(last)}\nno token, this\n<s>\nnor this\n")
    says = "2 lines are no token"
    said = refused(*words(tokenizer, tmp_path / "no.json", *size, "--keep-file", wanted), says=says)
    assert "'no token, this', 'nor this'" in said
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--vocab-size-remain K is missing"),
        (("--vocab-size-remain", 500), "not a multiple of 128 (128 x --balance-for 1), so shards "
         "would be padded; wanted 384 or 512, or --any-size"),
        (("--vocab-size-remain", 640, "--balance-for", 4), "wanted 512, or --any-size"),
        (("--vocab-size-remain", 640, "--balance-for", 8), "padded; wanted --any-size"),
        (("--vocab-size-remain", 128), "258 tokens have to stay and 700 of 700"),
        (("--vocab-size-remain", 1024), "258 tokens have to stay and 700 of 700"),
        (("--vocab-size-remain", 512, "--method", "leaf"), "needs --counts"),
        (("--vocab-size-remain", 512, "--prior", "-1"), "--prior -1"),
        (("--vocab-size-remain", 512, "--held-out", "/nowhere"), "/nowhere: No such file"),
        (("--vocab-size-remain", 512, "--held-out", "/x.bin"), "/x.bin: token ids; wanted text"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    tokenizer: Path, tmp_path: Path, flags: tuple[object, ...], says: str
) -> None:
    refused(*words(tokenizer, tmp_path / "plan.json", *flags), says=says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.gz"])
def test_held_out_text_is_read_as_corpora_are(
    tokenizer: Path, vocabulary: Vocabulary, tmp_path: Path, name: str
) -> None:
    texts, file = documents(20, seed=7), tmp_path / name
    whole = "".join(texts) if "txt" in name else "\n".join(json.dumps({"t": x}) for x in texts)
    data = whole.encode()
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    flags = ("--vocab-size-remain", 512, "--held-out", file, "--json-key", "t", "--json")
    report = json.loads(ok(*words(tokenizer, tmp_path / "plan.json", *flags)).out)
    (judged,) = report["held_out"].values()
    wanted = ["".join(texts)] if "txt" in name else texts
    assert judged["tokens_before"] == sum(map(len, vocabulary.encode(wanted)))
    assert judged["bytes"] == sum(len(text.encode()) for text in wanted)


@pytest.mark.parametrize(
    ("flag", "data", "says"),
    [
        ("--held-out", b"", "no text in it"),
        ("--held-out", b"\xff\xfe hello", "mine.txt: not UTF-8"),
        ("--keep-file", b"caf\xe9\n", "mine.txt: not UTF-8"),
    ],
)
def test_files_that_are_no_text_are_refused(
    tokenizer: Path, tmp_path: Path, flag: str, data: bytes, says: str
) -> None:
    (tmp_path / "mine.txt").write_bytes(data)
    flags = ("--vocab-size-remain", 512, flag, tmp_path / "mine.txt")
    refused(*words(tokenizer, tmp_path / "plan.json", *flags), says=says)
    assert not (tmp_path / "plan.json").exists()


def test_another_tokenizers_counts_are_refused(tmp_path: Path, counts: Path) -> None:
    other = write_bpe(tmp_path / "other", "\n".join(documents(200, seed=9)), vocab_size=690)
    flags = ("--vocab-size-remain", 512, "--counts", counts)
    refused(*words(other, tmp_path / "plan.json", *flags), says="counts of another tokenizer")


def test_a_plan_is_not_replaced_unasked(tokenizer: Path, tmp_path: Path) -> None:
    save = tmp_path / "plan.json"
    save.write_text("mine")
    refused(*words(tokenizer, save, "--vocab-size-remain", 512), says="--overwrite")
    assert save.read_text() == "mine"


def test_units_are_judged_as_often_as_they_come_up(vocabulary: Vocabulary, tmp_path: Path) -> None:
    """Against a loop over the text's units, one by one."""
    kept = make_vocab_plan(vocabulary, 384).kept
    plan = VocabPlan(
        kept=kept, source_size=700, tokenizer_digest=vocabulary.digest, method="prefix"
    )
    vocabulary.write(plan, tmp_path)
    pruned = open_vocabulary(tmp_path)
    texts = documents(12, seed=5)
    units = [unit for text in texts for unit in vocabulary.units(text)]
    same = covered = 0
    for unit in units:
        (before,), (after,) = vocabulary.encode_units([unit]), pruned.encode_units([unit])
        mapped = [kept.index(token) if token in kept else None for token in before]
        same += mapped == after
        covered += None not in mapped
    judged = judge(vocabulary, pruned, plan, texts)
    assert (judged.units, judged.identical, judged.covered) == (len(units), same, covered)
    assert judged.changed == 0 and judged.bytes == sum(len(text.encode()) for text in texts)
