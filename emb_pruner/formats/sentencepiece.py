"""SentencePiece ``*.model`` files, BPE and Unigram, by SentencePiece's own protobuf.

Kept pieces keep score, type and order. BPE looks merges up by their result, so its closed sets keep
the promises of `emb_pruner.forest`. In Unigram the best cut of a word stays the best one when its
pieces stay; the price of an unknown character hangs on the lowest score of all, and that of a
user-defined piece on the highest, so those two stay too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from emb_pruner.forest import Forest, Parts
from emb_pruner.formats.growing import bpe_parts, forest, never_found
from emb_pruner.formats.json_writing import write_files
from emb_pruner.formats.rank_files import RANK_FAMILIES, is_ranks
from emb_pruner.formats.spelling import SPACE, WORDS, crosses_words
from emb_pruner.vocab_plan import VocabPlan, check_fits
from megatron_prune.data.tokenizers import unreadable, vocabulary_digest
from megatron_prune.errors import ConfigError, DamagedError

FILE = "tokenizer.model"  # as it is written, whatever name it was read by
UNIGRAM, BPE = 1, 2
_MODEL_NAMES = {3: "word", 4: "character"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_REASONS = {
    UNKNOWN: "unknown",
    CONTROL: "special",
    USER_DEFINED: "added",
    UNUSED: "unused",
    BYTE: "byte",
}


def read_model(path: Path) -> Any:
    """The ``ModelProto`` of a file.

    Raises:
        ConfigError: a model of words or of single characters.
        DamagedError: not a SentencePiece model.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, in whichever of its implementations
        if is_ranks(path):
            raise ConfigError(
                f"tokenizer {path}: tiktoken ranks, of which those of "
                f"{', '.join(RANK_FAMILIES)} can be pruned; take the model's tokenizer.json"
            ) from None
        raise unreadable(path, error) from None
    if not proto.pieces:
        raise DamagedError(f"tokenizer {path}: no SentencePiece model; copy it from its source")
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        name = _MODEL_NAMES.get(proto.trainer_spec.model_type, proto.trainer_spec.model_type)
        raise ConfigError(
            f"tokenizer {path}: a SentencePiece model of type {name}; those of BPE and Unigram "
            "can be pruned"
        )
    return proto


def fixed_pieces(proto: Any) -> dict[int, str]:
    """The pieces that have to stay, with the reason."""
    pieces = proto.pieces
    found = {id: _REASONS[piece.type] for id, piece in enumerate(pieces) if piece.type != NORMAL}
    normal = [id for id, piece in enumerate(pieces) if piece.type == NORMAL]
    found |= {id: "character" for id in normal if len(pieces[id].piece) == 1}
    if proto.trainer_spec.model_type == UNIGRAM and normal:
        found.setdefault(min(normal, key=lambda id: pieces[id].score), "least likely")
        if "added" in found.values():
            found.setdefault(max(normal, key=lambda id: pieces[id].score), "most likely")
    return found


def pruned_model(proto: Any, plan: VocabPlan) -> bytes:
    """The model file of the kept pieces; a plan may hold ids of added tokens beyond the pieces."""
    pruned = type(proto)()  # not a copy: its self-test would be of the whole vocabulary
    for name in ("trainer_spec", "normalizer_spec", "denormalizer_spec"):
        if proto.HasField(name):
            getattr(pruned, name).CopyFrom(getattr(proto, name))
    for id, piece in enumerate(proto.pieces):
        if id in plan.new_ids:
            pruned.pieces.add().CopyFrom(piece)
    spec = pruned.trainer_spec
    spec.vocab_size = len(pruned.pieces)
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        if (id := getattr(spec, name)) in plan.new_ids:
            setattr(spec, name, plan.new_ids[id])
    return bytes(pruned.SerializeToString())


def _processor(proto: Any) -> Any:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return processor


class SentencePiece:
    """See `emb_pruner.formats.Vocabulary`.

    Args:
        path: what a user named.
        file: the model's file.
    """

    def __init__(self, path: Path, file: Path) -> None:
        self.path = path
        self.file = file
        self.proto = read_model(file)
        self.is_unigram = self.proto.trainer_spec.model_type == UNIGRAM
        self.kind = f"SentencePiece {'Unigram' if self.is_unigram else 'BPE'}"
        try:
            self._whole, self._inner = _processor(self.proto), _processor(self._bare())
            self.pieces = [piece.piece for piece in self.proto.pieces]
        except (RuntimeError, ValueError) as error:
            raise unreadable(file, error) from None
        self.size = len(self.pieces)
        # Unigram adds up scores along a text in float32: where two cuts are worth the same, what
        # came before decides.
        self._has_words = not self.is_unigram and not any(map(crosses_words, self.pieces))

    def _bare(self) -> Any:
        """The model without what it does to a text before it looks for pieces."""
        bare = type(self.proto)()
        bare.CopyFrom(self.proto)
        bare.normalizer_spec.Clear()
        bare.normalizer_spec.name = "identity"
        bare.normalizer_spec.add_dummy_prefix = False
        bare.normalizer_spec.remove_extra_whitespaces = False
        return bare

    @cached_property
    def digest(self) -> str:
        return vocabulary_digest({piece: id for id, piece in enumerate(self.pieces)})

    @cached_property
    def forest(self) -> Forest:
        mandatory = fixed_pieces(self.proto)
        parts, unmade = self.merged
        tried = {
            id: piece.replace(SPACE, " ")
            for id, piece in enumerate(self.pieces)
            if id not in mandatory and id not in unmade
        }
        return forest(
            parts=parts,
            order=[-piece.score for piece in self.proto.pieces],
            mandatory=mandatory,
            dead=unmade | never_found(self.encode, tried),
        )

    @cached_property
    def merged(self) -> tuple[list[Parts | None], set[int]]:
        """See `bpe_parts`."""
        if self.is_unigram:
            return [None] * self.size, set()
        texts, size = list(self.pieces), self.size
        found = {
            piece.piece: (-piece.score, id)
            for id, piece in enumerate(self.proto.pieces)
            if piece.type in (NORMAL, USER_DEFINED, UNUSED)
        }
        numbers = {text: id for text, (_, id) in found.items()}
        atoms: dict[int, list[int]] = {}
        for id, piece in enumerate(self.proto.pieces):
            if piece.type in (NORMAL, UNUSED):
                for letter in piece.piece:
                    if letter not in numbers:  # merges of unknown characters may be known
                        numbers[letter] = len(texts)
                        texts.append(letter)
                atoms[id] = [numbers[letter] for letter in piece.piece]
        return bpe_parts(atoms, lambda left, right: found.get(texts[left] + texts[right]), size)

    def token(self, id: int) -> str:
        return self.pieces[id] if id < len(self.pieces) else ""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self._whole.encode(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._whole.decode(list(ids)))

    def units(self, text: str) -> list[str]:
        normal = self._whole.normalize(text)
        return WORDS.findall(normal) if self._has_words else [normal]

    def encode_units(self, units: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self._inner.encode(list(units))]

    def write(self, plan: VocabPlan, directory: Path) -> list[str]:
        check_fits(plan, self.forest, self.digest, str(self.path))
        return write_files(self.files(plan), directory)

    def written(self, directory: Path) -> Path:
        return directory / FILE

    def files(self, plan: VocabPlan) -> dict[str, bytes]:
        """Name -> content of what `write` writes; the plan is not checked."""
        return {FILE: pruned_model(self.proto, plan)}
