"""Token ids in configurations: what is renumbered, what goes, what is refused."""

from __future__ import annotations

import pytest

from emb_pruner.config_ids import renumber, renumber_config
from emb_pruner.vocab_plan import VocabPlan
from megatron_prune.errors import ConfigError, PlanError

PLAN = VocabPlan(kept=(0, 2, 5, 6, 9), source_size=10, tokenizer_digest="", method="leaf")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("bos_token_id", 2, 1),
        ("eos_token_id", [5, 9], [2, 4]),
        ("pad_token_id", None, None),
        ("pad_token_id", -1, -1),
        ("decoder_start_token_id", 0, 0),
        ("forced_eos_token_id", 6, 3),
        ("suppress_tokens", [0, 1, 9], [0, 4]),
        ("begin_suppress_tokens", None, None),
        ("bad_words_ids", [[5, 6], [6, 7], [9]], [[2, 3], [4]]),
        ("force_words_ids", [[5, 6], [[9], [0]]], [[2, 3], [[4], [0]]]),
        ("forced_decoder_ids", [[1, 9], [2, None]], [[1, 4], [2, None]]),
        ("sequence_bias", [[[5, 6], -1.5], [[7], 2.0]], [[[2, 3], -1.5]]),
        ("vocab_size", 9, 9),
        ("temperature", 0.6, 0.6),
    ],
)
def test_ids_become_places_among_the_kept(name: str, old: object, new: object) -> None:
    assert renumber({name: old}, PLAN, "config.json") == {name: new}
    nested = {"text_config": {name: old}}
    assert renumber(nested, PLAN, "config.json") == {"text_config": {name: new}}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("eos_token_id", 7, "config.json: eos_token_id is 7, which the plan drops; plan again"),
        ("eos_token_id", [5, 7], "eos_token_id is 7, which the plan drops"),
        ("forced_decoder_ids", [[1, 3]], "forced_decoder_ids is 3, which the plan drops"),
        ("force_words_ids", [[5, 3]], "force_words_ids is 3, which the plan drops"),
    ],
)
def test_a_dropped_id_that_is_needed_is_refused(name: str, value: object, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        renumber({name: value}, PLAN, "config.json")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("eos_token_id", 10, "eos_token_id is 10; wanted an id of its tokenizer, 0 to 9"),
        ("eos_token_id", "</s>", "is '</s>'; wanted an id"),
        ("bos_token_id", True, "is True; wanted an id"),
        ("suppress_tokens", 3, "suppress_tokens is 3; wanted a list"),
        ("bad_words_ids", [3], "bad_words_ids is 3; wanted a list"),
        ("sequence_bias", [[[3]]], "wanted pairs of ids and a bias"),
        ("forced_decoder_ids", [[3]], "wanted pairs of a position and an id"),
    ],
)
def test_what_is_no_id_is_refused(name: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        renumber({name: value}, PLAN, "config.json")


def test_what_transformers_takes_for_granted_is_written_down() -> None:
    """The defaults checked here are read from transformers itself."""
    from transformers import AutoConfig

    for family in ("llama", "mistral", "qwen2"):
        taken = AutoConfig.for_model(family)
        found = renumber_config({"model_type": family}, PLAN, "config.json")
        loaded = AutoConfig.for_model(**found)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            old = getattr(taken, name)
            assert getattr(loaded, name) == (None if old is None else PLAN.new_ids.get(old))
    given = {"model_type": "llama", "eos_token_id": None}
    assert renumber_config(given, PLAN, "config.json")["eos_token_id"] is None
