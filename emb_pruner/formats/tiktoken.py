"""tiktoken ranks as a vocabulary, written as ranks and as a ``tokenizer.json``.

A unit that is a token is found whole; in others the pair whose bytes have the
lowest rank merges first. Of each token only the two parts it has when tokenised alone can ever
merge to it, so one merge a token says the same in a ``tokenizer.json``.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from emb_pruner.forest import Forest, Parts
from emb_pruner.formats.companions import pruned_companions
from emb_pruner.formats.growing import bpe_parts, forest, never_found
from emb_pruner.formats.json_writing import check_numbers, dump_document, write_files
from emb_pruner.formats.rank_files import family_of, pruned_ranks, read_ranks
from emb_pruner.formats.spelling import to_letters
from emb_pruner.formats.tokenizer_json import FILE
from emb_pruner.vocab_plan import VocabPlan, check_fits
from megatron_prune.data.tokenizers import vocabulary_digest
from megatron_prune.errors import ConfigError


class Tiktoken:
    """See `emb_pruner.formats.Vocabulary`. Units are plain text.

    Args:
        path: what a user named.
        file: of the ranks.
    """

    kind = "tiktoken"

    def __init__(self, path: Path, file: Path) -> None:
        self.path = path
        self.file = file
        self.family = family_of(file)
        self.ranks = read_ranks(file)
        if missing := 256 - sum(len(token) == 1 for token in self.ranks):
            raise ConfigError(
                f"tokenizer {file}: {missing} of the 256 single bytes are missing, so that it "
                "fails on text with them; prune again from the ranks it was made of"
            )
        start = len(self.ranks)
        self.specials = {name: start + place for place, name in enumerate(self.family.specials)}
        self.tokens = {id: to_letters(token) for token, id in self.ranks.items()}
        self.tokens |= {id: name for name, id in self.specials.items()}
        self.ids = {token: id for id, token in self.tokens.items()}
        self.size = len(self.ids)

    @cached_property
    def _encoding(self) -> Any:
        try:
            from tiktoken import Encoding
        except ImportError:
            raise ConfigError(
                f"tokenizer {self.file}: reading it needs tiktoken; pip install tiktoken"
            ) from None
        return Encoding(
            self.file.name,
            pat_str=self.family.pattern,
            mergeable_ranks=self.ranks,
            special_tokens=self.specials,
        )

    @cached_property
    def digest(self) -> str:
        return vocabulary_digest(self.ids)

    @cached_property
    def forest(self) -> Forest:
        texts = {id: token for token, id in self.ranks.items()}
        atoms = {
            id: [self.ranks[token[at : at + 1]] for at in range(len(token))]
            for token, id in self.ranks.items()
        }

        def merge(left: int, right: int) -> tuple[float, int] | None:
            rank = self.ranks.get(texts[left] + texts[right])
            return None if rank is None else (rank, rank)

        parts, _ = bpe_parts(atoms, merge, self.size)  # the others are found whole
        mandatory = {id: "byte" for token, id in self.ranks.items() if len(token) == 1}
        mandatory |= dict.fromkeys(self.specials.values(), "special")
        tried = {}
        for token, id in self.ranks.items():
            if id not in mandatory and (text := _decoded(token)) is not None:
                tried[id] = text
        return forest(
            parts=parts,
            order=list(range(self.size)),
            mandatory=mandatory,
            dead=never_found(self.encode, tried),
        )

    def token(self, id: int) -> str:
        return self.tokens.get(id, "")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encoding.encode(self._normal(text), allowed_special="all") for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._encoding.decode(list(ids)))

    def units(self, text: str) -> list[str]:
        found: list[str] = []
        for piece in self._special_pattern.split(self._normal(text)):
            if piece in self.specials:
                found.append(piece)
            elif piece:
                found.extend(unit for unit, _ in self._splitter.pre_tokenize_str(piece))
        return found

    def encode_units(self, units: Sequence[str]) -> list[list[int]]:
        encode = self._encoding._encode_single_piece
        return [[self.specials[unit]] if unit in self.specials else encode(unit) for unit in units]

    def write(self, plan: VocabPlan, directory: Path) -> list[str]:
        check_fits(plan, self.forest, self.digest, str(self.path))
        return write_files(self.files(plan), directory)

    def written(self, directory: Path) -> Path:
        return directory / self.file.name

    def files(self, plan: VocabPlan) -> dict[str, bytes]:
        """Name -> content of the ranks and of the same tokenizer for `tokenizers`; no checks."""
        text = dump_document(pruned_as_json(self, plan))
        check_numbers(text, self.ids, plan)
        files = {"tokenizer_config.json": b"{}"}
        if self.path.is_dir():
            files |= pruned_companions(self.file.parent, plan)
        config = json.loads(files["tokenizer_config.json"])
        config.pop("auto_map", None)  # it would ask for the author's code
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("eos_token", self.family.end)
        config.setdefault("clean_up_tokenization_spaces", False)
        files["tokenizer_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        files[self.file.name] = pruned_ranks(self.ranks, plan)
        files[FILE] = text.encode()
        return files

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest = sorted(self.specials, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest))})")

    @cached_property
    def _splitter(self) -> Any:
        from tokenizers import Regex, pre_tokenizers

        return pre_tokenizers.Split(Regex(self.family.pattern), "isolated")

    def _normal(self, text: str) -> str:
        form = self.family.normal_form
        return text if form is None else unicodedata.normalize(form, text)


def _decoded(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def pruned_as_json(vocabulary: Tiktoken, plan: VocabPlan) -> dict[str, Any]:
    """The kept ranks as a tokenizer.json's document."""
    family, tokens = vocabulary.family, vocabulary.tokens
    kept = {id: None for id in plan.kept if id < len(vocabulary.ranks)}
    parts: list[Parts] = [
        part for id in kept if (part := vocabulary.forest.parts[id]) and kept.keys() >= set(part)
    ]
    normalizer = None if family.normal_form is None else {"type": family.normal_form}
    bytes_only = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": family.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": plan.new_ids[id],
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name, id in vocabulary.specials.items()
        ],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_only]},
        "post_processor": bytes_only,
        "decoder": bytes_only,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {tokens[id]: plan.new_ids[id] for id in kept},
            "merges": [[tokens[left], tokens[right]] for left, right in parts],
        },
    }
