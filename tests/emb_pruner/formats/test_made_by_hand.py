"""Rules that trained vocabularies seldom show, on tables of a few tokens with controls."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from emb_pruner.formats import open_vocabulary
from emb_pruner.formats.sentencepiece import (
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    read_model,
)
from tests.emb_pruner.formats.promises import plan_of, write, write_unchecked

Piece = tuple[str, float, int]


def unigram(folder: Path, pieces: list[Piece]) -> Path:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    for piece, score, type in [("<unk>", 0.0, UNKNOWN), ("▁", -1.0, NORMAL), *pieces]:
        proto.pieces.add(piece=piece, score=score, type=type)
    proto.trainer_spec.model_type = UNIGRAM
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.trainer_spec.pad_piece = "<pad>"
    proto.normalizer_spec.name = "identity"
    (folder / "hand.model").write_bytes(proto.SerializeToString())
    return folder / "hand.model"


# qu + e: -24. An unknown q + ue: the lowest score - 10.1, which is -30.1, and -22.1 without zzz.
PRICE_OF_UNKNOWN: list[Piece] = [
    ("u", -1.0, NORMAL),
    ("e", -12.0, NORMAL),
    ("qu", -12.0, NORMAL),
    ("ue", -0.1, NORMAL),
    ("zzz", -20.0, NORMAL),
]
# <> as a user's piece: twice the highest score - 0.1, which is -0.12, and -1.1 without "the".
PRICE_OF_ADDED: list[Piece] = [
    ("<", -0.5, NORMAL),
    (">", -0.5, NORMAL),
    ("<>", 0.0, USER_DEFINED),
    ("e", -0.5, NORMAL),
    ("the", -0.01, NORMAL),
]


@pytest.mark.parametrize(
    ("pieces", "text", "reason"),
    [(PRICE_OF_UNKNOWN, "que", "least likely"), (PRICE_OF_ADDED, "e<>e", "most likely")],
)
def test_the_piece_that_sets_a_price_stays(
    pieces: list[Piece], text: str, reason: str, tmp_path: Path
) -> None:
    source = open_vocabulary(unigram(tmp_path, pieces))
    last = source.forest.size - 1
    assert source.forest.mandatory[last] == reason
    old = source.encode([text])[0]
    kept = source.forest.required | set(old)
    plan = plan_of(source, kept)
    assert write(source, plan, tmp_path / "kept").encode([text])[0] == [
        plan.new_ids[id] for id in old
    ]


def test_without_the_least_likely_piece_unknown_characters_get_cheaper(tmp_path: Path) -> None:
    source = open_vocabulary(unigram(tmp_path, PRICE_OF_UNKNOWN))
    plan = plan_of(source, range(source.forest.size - 1))
    pruned = write_unchecked(source, plan, tmp_path / "pruned")
    assert pruned.encode(["que"]) != source.encode(["que"])


def test_roles_of_a_sentencepiece_model_follow_their_pieces(tmp_path: Path) -> None:
    pieces: list[Piece] = [
        ("a", -1.0, NORMAL),
        ("aa", -1.0, NORMAL),
        ("b", -3.0, NORMAL),
        ("<pad>", 0.0, CONTROL),
    ]
    path = unigram(tmp_path, pieces)
    proto = read_model(path)
    proto.trainer_spec.pad_id = 5
    path.write_bytes(proto.SerializeToString())
    source = open_vocabulary(path)
    pruned = write(source, plan_of(source, [0, 1, 2, 4, 5]), tmp_path / "pruned")
    spec = read_model(pruned.path).trainer_spec
    assert (spec.vocab_size, spec.unk_id, spec.pad_id, spec.eos_id) == (5, 0, 4, 2)
    assert [pruned.token(id) for id in range(5)] == ["<unk>", "▁", "a", "b", "<pad>"]


def test_a_rank_that_nothing_merges_to_is_found_whole_in_both_forms(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    tokens = [*(bytes([value]) for value in range(256)), b"ab", b"cdef"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
    source = open_vocabulary(tmp_path / "qwen.tiktoken")
    assert source.forest.parts[256] == (97, 98) and source.forest.parts[257] is None
    assert source.forest.dead == set()
    kept = set(range(source.forest.size)) - {256}
    pruned = write(source, plan_of(source, kept), tmp_path / "pruned")
    as_json = open_vocabulary(tmp_path / "pruned/tokenizer.json")
    for form in (pruned, as_json):
        assert form.encode(["cdef", "abcdef"]) == [[256], [97, 98, *b"cdef"]]
