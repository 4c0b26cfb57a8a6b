"""What ``evaluate`` and ``generate`` are asked to do; the fields are their flags."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.engine.forward.sampling import Sampling
from megatron_prune.engine.running import Engine
from megatron_prune.engine.train.options import TrainOptions
from megatron_prune.errors import ConfigError
from megatron_prune.families import FAMILIES
from megatron_prune.flags import Group, flag, flag_name, given, positive

Bar = Callable[[], AbstractContextManager[Callable[[int], Callable[[int], object]]]]
"""Shows a progress bar for the time of a block: called with the total, it gives what is told of
each part done; as `Console.bar` does in ``stages``."""

_DOMAINS = Group("domains, instead of --data")
_TASKS = Group("benchmark tasks (needs pip install 'megatron_prune[eval]')")


@dataclass(frozen=True, kw_only=True)
class LoadedModel(Engine):
    """Which model is run, and how."""

    load: Path = flag("checkpoint of any format", metavar="CKPT_OR_HF")
    family: str | None = flag(
        "of a stock Megatron checkpoint whose arguments do not tell",
        default=None,
        choices=tuple(FAMILIES),
    )
    tokenizer_model: Path | None = flag(
        "of the model (default: the checkpoint's own)", default=None, metavar="PATH"
    )

    @property
    def tokenizer_path(self) -> Path:
        return self.tokenizer_model or self.load


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(LoadedModel):
    data: Path | None = flag("text, or JSON lines with 'text'", default=None)
    seq_length: int | None = flag(
        "of a window (default: 1024); with --tasks at most (default: all the model takes)",
        default=None,
        metavar="N",
        parse=positive,
    )
    max_windows: int | None = flag(
        "the first N only; with --domains of each", default=None, metavar="N", parse=positive
    )
    micro_batch_size: int = flag(
        "sequences of one forward pass", default=1, metavar="N", parse=positive
    )
    json: Path | None = flag("write the result here too", default=None, metavar="OUT")
    save: Path | None = flag("results of --tasks, or of --per-domain", default=None, metavar="JSON")

    domains: Path | None = flag(
        "the recipe of `train`", default=None, group=_DOMAINS, metavar="YAML"
    )
    per_domain: bool = flag(
        "tell the loss of each domain; --save keeps them: targets for `train`",
        default=False,
        group=_DOMAINS,
    )
    split: str = flag("as in `train`", default=TrainOptions.split, group=_DOMAINS, metavar="SHARES")
    seed: int = flag("as in `train`", default=TrainOptions.seed, group=_DOMAINS, metavar="N")
    eod_mask_loss: bool = flag("do not count the prediction of EOD", default=False, group=_DOMAINS)
    data_cache_path: Path | None = flag(
        "sample indices (default: not kept)", default=None, group=_DOMAINS, metavar="DIR"
    )

    tasks: tuple[str, ...] = flag(
        "of lm-evaluation-harness, instead of --data; recipes/standard_tasks.yaml has a list",
        default=(),
        group=_TASKS,
        metavar="NAME[:EXAMPLES]",
    )
    num_fewshot: int | None = flag(
        "examples before each question, where NAME does not say (default: the task's)",
        default=None,
        group=_TASKS,
        metavar="N",
    )
    limit: int | None = flag(
        "questions of each task", default=None, group=_TASKS, metavar="N", parse=positive
    )
    apply_chat_template: bool = flag(
        "ask as a user does, with the model's chat template; examples are earlier turns",
        default=False,
        group=_TASKS,
    )
    include_path: Path | None = flag(
        "task files of your own", default=None, group=_TASKS, metavar="DIR"
    )
    backend: str = flag(
        "auto: the harness' own for Hugging Face directories in one process, else this one's",
        default="auto",
        group=_TASKS,
        choices=("auto", "hf", "megatron"),
    )

    @property
    def window_length(self) -> int:
        """Tokens of a window of text."""
        return self.seq_length or 1024

    def chosen(self) -> str:
        """What the model is judged on: ``data``, ``domains`` or ``tasks``.

        Raises:
            ConfigError: none of them or several, or a flag of another; or a size below 1.
        """
        asked = given(self)
        found = [name for name in ("data", "domains", "tasks") if name in asked]
        if len(found) != 1:
            told = " and ".join(map(flag_name, found)) or "nothing to judge it on"
            raise ConfigError(
                f"{told}: give one of --data TEXT, --domains RECIPE and --tasks NAMES"
            )
        for name in asked:
            goes = _GOES_WITH.get(name, found)
            if found[0] not in goes:
                flags = " or ".join(map(flag_name, goes))
                raise ConfigError(f"{flag_name(name)} goes with {flags}")
        if found[0] == "domains" and self.save is not None and not self.per_domain:
            raise ConfigError("--save writes the loss of each domain; add --per-domain")
        if self.micro_batch_size < 1:
            raise ConfigError(f"--micro-batch-size is {self.micro_batch_size}; wanted 1 or more")
        return found[0]


_OF_DOMAINS = ("per_domain", "split", "seed", "eod_mask_loss", "data_cache_path")
_OF_TASKS = ("num_fewshot", "limit", "include_path", "apply_chat_template")
_GOES_WITH = {
    "json": ("data",),
    "max_windows": ("data", "domains"),
    "save": ("domains", "tasks"),
    **dict.fromkeys(_OF_DOMAINS, ("domains",)),
    **dict.fromkeys(_OF_TASKS, ("tasks",)),
}


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Sampling, LoadedModel):
    prompt: str | None = flag(
        "the text to continue; or --prompt-file", default=None, metavar="TEXT"
    )
    prompt_file: Path | None = flag("a file that holds it", default=None, metavar="FILE")
    chat: bool = flag(
        "ask as a user does, with the model's chat template",
        default=False,
        also=("--apply-chat-template",),
    )
    max_new_tokens: int = flag("at most", default=64, metavar="N", parse=positive)
