"""Token ids in config.json and generation_config.json, from the source's numbers to the plan's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from emb_pruner.vocab_plan import VocabPlan
from megatron_prune.errors import ConfigError, PlanError
from megatron_prune.families import on_disk

_NEVER = ("suppress_tokens", "begin_suppress_tokens")  # ids that are not to be generated
# lists of ids, likewise; and those that end a text in Qwen's first generation
_NEVER_SEQUENCES = ("bad_words_ids", "stop_words_ids")


def renumber_config(values: Mapping[str, Any], plan: VocabPlan, where: str) -> dict[str, Any]:
    """A config.json with new ids; those that transformers takes for granted are written down.

    Raises:
        ConfigError, PlanError: as `renumber`.
    """
    renumbered = renumber(values, plan, where)
    family = on_disk(values.get("model_type"))
    for name, old in () if family is None else family.defaults.items():
        if name.endswith("_token_id") and name not in values:
            renumbered[name] = plan.new_ids.get(old)
    return renumbered


def renumber(values: Mapping[str, Any], plan: VocabPlan, where: str) -> dict[str, Any]:
    """A configuration with new ids, however deep they stand.

    ``*_token_id`` may be a number, a list or null; below 0 means none, as in Llama's first files.
    What is forbidden to be generated and dropped needs no mention any more and is left out.

    Raises:
        ConfigError: something that is no id of the source tokenizer.
        PlanError: the plan drops a token that the configuration needs.
    """
    renumbered = {}
    for name, value in values.items():
        at = f"{where}: {name}"
        if isinstance(value, Mapping) and name not in _HANDLERS:
            renumbered[name] = renumber(value, plan, at)
        elif value is not None and name in _HANDLERS:
            renumbered[name] = _HANDLERS[name](value, plan, at)
        elif value is not None and name.endswith(("_token_id", "_token_ids")):
            renumbered[name] = _needed(value, plan, at)
        else:
            renumbered[name] = value
    return renumbered


def _new_id(old: Any, plan: VocabPlan, at: str) -> int | None:
    """None: the plan drops it."""
    if type(old) is not int or old >= plan.source_size:
        raise ConfigError(
            f"{at} is {old!r}; wanted an id of its tokenizer, 0 to {plan.source_size - 1}; mend "
            "the file"
        )
    return old if old < 0 else plan.new_ids.get(old)


def _needed(value: Any, plan: VocabPlan, at: str) -> Any:
    if isinstance(value, list):
        return [_needed(part, plan, at) for part in value]
    new = _new_id(value, plan, at)
    if new is None:
        raise PlanError(
            f"{at} is {value}, which the plan drops; plan again with this token among those that "
            "stay (--keep-file)"
        )
    return new


def _list(value: Any, at: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{at} is {value!r:.60}; wanted a list; mend the file")
    return value


def _never(value: Any, plan: VocabPlan, at: str) -> list[int]:
    found = (_new_id(old, plan, at) for old in _list(value, at))
    return [new for new in found if new is not None]


def _sequence(value: Any, plan: VocabPlan, at: str) -> list[int] | None:
    """None: it holds a token that the plan drops."""
    ids = [_new_id(old, plan, at) for old in _list(value, at)]
    return None if None in ids else [new for new in ids if new is not None]


def _never_sequences(value: Any, plan: VocabPlan, at: str) -> list[list[int]]:
    found = (_sequence(ids, plan, at) for ids in _list(value, at))
    return [ids for ids in found if ids is not None]


def _biases(value: Any, plan: VocabPlan, at: str) -> list[list[Any]]:
    """``sequence_bias``: pairs of ids and what is added to the last one's logit."""
    pairs = [_list(pair, at) for pair in _list(value, at)]
    if any(len(pair) != 2 for pair in pairs):
        raise ConfigError(f"{at}: wanted pairs of ids and a bias; mend the file")
    found = ((_sequence(ids, plan, at), bias) for ids, bias in pairs)
    return [[ids, bias] for ids, bias in found if ids is not None]


def _placed(value: Any, plan: VocabPlan, at: str) -> list[list[Any]]:
    """``forced_decoder_ids``: pairs of a position and an id, or null for none."""
    pairs = [_list(pair, at) for pair in _list(value, at)]
    if any(len(pair) != 2 for pair in pairs):
        raise ConfigError(f"{at}: wanted pairs of a position and an id; mend the file")
    return [[place, None if old is None else _needed(old, plan, at)] for place, old in pairs]


_HANDLERS: dict[str, Callable[[Any, VocabPlan, str], Any]] = {
    **dict.fromkeys(_NEVER, _never),
    **dict.fromkeys(_NEVER_SEQUENCES, _never_sequences),
    "sequence_bias": _biases,
    "forced_decoder_ids": _placed,
    "force_words_ids": _needed,
}
