"""What a model says to a prompt, checked first and tokenised by the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prune.data.tokenizers import TextTokenizer, chat_tokenizer, load_tokenizer
from megatron_prune.engine.failures import on_first_rank
from megatron_prune.engine.forward.decoding import continue_rows
from megatron_prune.engine.forward.model import ModelOptions, build_model, check_model
from megatron_prune.engine.forward.weights import load_weights
from megatron_prune.engine.groups import Groups
from megatron_prune.errors import ConfigError
from megatron_prune.evaluate.options import Bar, GenerateOptions
from megatron_prune.model.shape import ModelConfig
from megatron_prune.parsing import read_table
from megatron_prune.sources.source import Source
from megatron_prune.store import open_source


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Attributes:
    text: the prompt and its continuation; the answer alone in a chat.
    tokens: those added, the one that ended it included.
    is_ended: by a token that ends a text, not by the limit.
    """

    text: str
    tokens: tuple[int, ...]
    is_ended: bool

    def __str__(self) -> str:
        return self.text


def open_for_generation(options: GenerateOptions) -> Source:
    """The model, opened and checked against the options; no weight is read.

    Raises:
        ShapeError: the layout does not fit the model.
        CheckpointError: there is no model at ``load``.
    """
    source = open_source(options.load, family=options.family)
    source.config.shape.check_uniform("generate", "transformers on its export")
    options.grid.check(source.config.shape)
    check_model(source.config, ModelOptions.of(options, 2 * options.grid.tensor_parallel), 1)
    return source


def stop_tokens(source: Source, eod: int | None) -> frozenset[int]:
    """The tokens that end a text: those of generation_config.json, else of config.json, else the
    tokenizer's, as transformers looks for them."""
    path = source.companion_files.get("generation_config.json")
    values = {} if path is None else read_table(path, ConfigError, "not a generation config")
    for found in (values.get("eos_token_id"), source.config.hf_config.get("eos_token_id"), eod):
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def _tokenise(
    options: GenerateOptions, prompt: str, config: ModelConfig
) -> tuple[list[int], TextTokenizer]:
    """The prompt's tokens, special ones as the tokenizer adds them.

    Raises:
        ConfigError: no chat template, a tokenizer of another vocabulary, or a prompt that does not
            fit with what is to be added.
    """
    where = options.tokenizer_path
    tokenizer = load_tokenizer(where)
    if options.chat:
        own = chat_tokenizer(where)
        message = [{"role": "user", "content": prompt}]
        text = own.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        ids = tokenizer.encode(prompt, add_special_tokens=True)
    if not ids:
        raise ConfigError("--prompt: it is empty; wanted at least one token to continue")
    if max(ids) >= config.shape.vocab_size:
        raise ConfigError(
            f"tokenizer {where}: makes token {max(ids)}, the model has a vocabulary of "
            f"{config.shape.vocab_size}; give the model's own with --tokenizer-model"
        )
    _check_length(len(ids), options.max_new_tokens, config)
    return ids, tokenizer


def _check_length(prompt_tokens: int, new_tokens: int, config: ModelConfig) -> None:
    window = config.sliding_window or config.max_position_embeddings
    most = min(window, config.max_position_embeddings)
    if prompt_tokens >= most:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens, the model {most} positions, its answer "
            f"included; give a prompt of {most - 1} or less"
        )
    if prompt_tokens + new_tokens > most:
        raise ConfigError(
            f"--max-new-tokens {new_tokens} behind a prompt of {prompt_tokens} tokens is more than "
            f"the {most} positions of the model; give {most - prompt_tokens} or less"
        )


def generate(
    source: Source, options: GenerateOptions, prompt: str, groups: Groups, bar: Bar
) -> Generation:
    """The continuation of ``prompt``, on every rank.

    Raises:
        ConfigError: see `_tokenise`.
    """
    groups.ranks.agree("the prompt", repr((options, prompt)))
    ids, tokenizer = on_first_rank(groups.ranks, lambda: _tokenise(options, prompt, source.config))
    ends = stop_tokens(source, tokenizer.eod)
    # rounded up, as sequence parallelism does; rotary positions are made for the length at hand
    tp = groups.grid.tensor_parallel
    whole = -(-(len(ids) + options.max_new_tokens) // tp) * tp
    length = min(whole, source.config.max_position_embeddings // tp * tp)
    model = build_model(source.config, groups, ModelOptions.of(options, max(length, 2)))
    load_weights(model, source, groups)
    with bar() as start:
        (new,) = continue_rows(
            model,
            [ids],
            groups,
            max_new_tokens=[options.max_new_tokens],
            is_done=lambda _, tokens: tokens[-1] in ends,
            sampling=options,
            progress=start(options.max_new_tokens),
        )
    is_ended = new[-1] in ends
    added = _added_text(tokenizer, ids, new[:-1] if is_ended else new)
    text = added.lstrip() if options.chat else prompt + added
    return Generation(text=text, tokens=tuple(new), is_ended=is_ended)


def _added_text(tokenizer: TextTokenizer, ids: Sequence[int], new: Sequence[int]) -> str:
    """What ``new`` adds to the text of ``ids``; alone it might lose its leading space."""
    before, whole = tokenizer.decode(ids), tokenizer.decode([*ids, *new])
    before = before.rstrip("\N{REPLACEMENT CHARACTER}")  # a character that ``new`` completes
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new)
