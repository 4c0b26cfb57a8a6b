"""What `emb_pruner.formats` promises, on small tokenizers of every format."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emb_pruner.formats import Vocabulary, open_vocabulary
from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.errors import PlanError
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

SIZE = 640  # specials, bytes and characters are up to 487 of them


@pytest.fixture(scope="session")
def pruned(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return write(vocabulary, some_plan(vocabulary, SIZE), tmp_path_factory.mktemp("pruned"))


def test_the_ids_of_a_text_are_those_of_its_units(vocabulary: Vocabulary) -> None:
    texts = ["".join(prose()), *strange_texts(vocabulary, 300)]
    for text, whole in zip(texts, vocabulary.encode(texts)):
        units = vocabulary.encode_units(vocabulary.units(text))
        assert list(chain.from_iterable(units)) == whole


def test_units_of_kept_tokens_take_the_mapped_ids(
    vocabulary: Vocabulary, pruned: Vocabulary
) -> None:
    plan = some_plan(vocabulary, SIZE)
    texts = [*prose(), *strange_texts(vocabulary, 3000)]
    checked, broken = broken_units(vocabulary, pruned, plan, texts)
    assert checked > 500 and broken == []


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_keeps_its_units_and_comes_back_as_before(
    vocabulary: Vocabulary, pruned: Vocabulary, text: str
) -> None:
    plan = some_plan(vocabulary, SIZE)
    assert vocabulary.units(text) == pruned.units(text)
    assert broken_units(vocabulary, pruned, plan, [text])[1] == []
    assert texts_that_change(vocabulary, pruned, [text]) == []


def test_texts_come_back_as_before(vocabulary: Vocabulary, pruned: Vocabulary) -> None:
    assert texts_that_change(vocabulary, pruned, [*prose(), *strange_texts(vocabulary, 500)]) == []


def test_without_closure_units_of_kept_tokens_change(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    if vocabulary.kind == "SentencePiece Unigram":
        pytest.skip("nothing is merged: every set is closed")
    plan = unclosed_plan(vocabulary, SIZE)
    open_one = write_unchecked(vocabulary, plan, tmp_path)
    assert broken_units(vocabulary, open_one, plan, prose())[1]
    with pytest.raises(PlanError, match="without what they are merged from"):
        vocabulary.write(plan, tmp_path)


def test_every_kept_token_can_be_produced(vocabulary: Vocabulary, pruned: Vocabulary) -> None:
    plan = some_plan(vocabulary, SIZE)
    assert pruned.forest.size == SIZE
    assert [pruned.token(id) for id in range(SIZE)] == [vocabulary.token(id) for id in plan.kept]
    assert pruned.forest.dead == set()
    assert pruned.forest.unreachable(set(range(SIZE))) == set()


def test_the_plan_of_everything_changes_no_id(vocabulary: Vocabulary, tmp_path: Path) -> None:
    same = write(vocabulary, plan_of(vocabulary, range(vocabulary.forest.size)), tmp_path)
    texts = [*prose(), *strange_texts(vocabulary, 200)]
    assert same.digest == vocabulary.digest
    assert same.encode(texts) == vocabulary.encode(texts)


def test_the_digest_is_that_of_the_tokenizer_loaded_to_encode(pruned: Vocabulary) -> None:
    path = pruned.path.parent if pruned.kind == "tiktoken" else pruned.path
    assert pruned.digest == load_tokenizer(path).digest


def test_a_plan_for_another_tokenizer_is_refused(
    vocabulary: Vocabulary, pruned: Vocabulary, tmp_path: Path
) -> None:
    plan = some_plan(vocabulary, SIZE)
    with pytest.raises(PlanError, match=f"made for another one .{vocabulary.forest.size} tokens"):
        pruned.write(plan, tmp_path)
    required = sorted(vocabulary.forest.required)
    with pytest.raises(PlanError, match=f"drops 1 tokens that have to stay .{required[0]}"):
        vocabulary.write(plan_of(vocabulary, required[1:]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_it_opens_again_from_its_path(vocabulary: Vocabulary) -> None:
    assert open_vocabulary(vocabulary.path).digest == vocabulary.digest
