"""lm-evaluation-harness' view of a `SharedModel`: tokens as its Hugging Face backend makes them.

This module imports lm_eval, an optional dependency: import it only where tasks are run. Contexts
are cut on the left where they do not fit, special tokens are those the tokenizer adds by itself,
and an empty context is the BOS (else EOS) token, all as in ``lm_eval.models.huggingface``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_prune.errors import ConfigError
from megatron_prune.evaluate.served import Score, SharedModel

_MAX_NEW_TOKENS = 256  # of a task that does not say, as in lm_eval.models.huggingface


class SharedModelLM(TemplateLM):
    """A model at any TP, PP and DP, for the first rank.

    Args:
        max_length: positions of the model.
    """

    def __init__(self, shared: SharedModel, tokenizer: Any, *, max_length: int) -> None:
        super().__init__()
        self._shared, self.tokenizer, self._max_length = shared, tokenizer, max_length

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text; without its system message where the template knows none."""
        how = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **how))
        except TemplateError:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            return str(self.tokenizer.apply_chat_template(turns, **how))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[Score]:
        rows, scored = [], []
        for _strings, context, continuation in requests:
            # one token more than there are positions: the last is only predicted
            rows.append([*context, *continuation][-(self._max_length + 1) :])
            scored.append(min(len(continuation), len(rows[-1]) - 1))
        return self._shared.scores(rows, scored)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        windows, owners = [], []
        for number, (string,) in enumerate(request.args for request in requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (nats, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[number] += nats
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        rows, most, until = [], [], []
        for context, given in (request.args for request in requests):
            most.append(_new_tokens(given))
            until.append(_stop_texts(given))
            room = self._max_length - most[-1]
            if room < 1:
                raise ConfigError(
                    f"--tasks: a task wants {most[-1]} new tokens, the model has "
                    f"{self._max_length} positions; leave the task out"
                )
            rows.append(self.tok_encode(context)[-room:])
        texts = []
        for tokens, ends in zip(self._shared.continuations(rows, most, until), until):
            text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
            for end in ends:
                text = text.split(end)[0]
            texts.append(text)
        return texts


def _stop_texts(given: dict[str, Any]) -> list[str]:
    until = given.get("until") or []
    return [end for end in ([until] if isinstance(until, str) else until) if end]


def _new_tokens(given: dict[str, Any]) -> int:
    """Refuses to draw: results would depend on the layout's rounding and not be comparable."""
    if given.get("do_sample") and float(given.get("temperature", 1.0)) > 0:
        raise ConfigError(
            "--tasks: a task draws its answers (do_sample); only greedy decoding is supported, "
            "leave the task out or export the model and use --backend hf"
        )
    names = ("max_gen_toks", "max_new_tokens", "max_tokens")
    return int(next((given[name] for name in names if name in given), _MAX_NEW_TOKENS))
