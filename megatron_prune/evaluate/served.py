"""A model on many ranks that answers the first rank's questions.

lm-evaluation-harness runs on the first rank alone: it draws examples, reads data sets and counts.
What it asks goes to all ranks, each copy of the model answers its share of the batches, and the
first rank gets all answers. The other ranks wait in `SharedModel.serve` until it says stop.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_prune.engine.forward.decoding import continue_rows, score_rows
from megatron_prune.engine.forward.model import LanguageModel
from megatron_prune.engine.forward.sampling import Sampling
from megatron_prune.engine.groups import Groups
from megatron_prune.errors import DistributedError, exit_code

Score = tuple[float, bool]  # log-probability in nats; whether greedy decoding would say the same


@dataclass(frozen=True, kw_only=True)
class _Question:
    """Attributes:
    scored: of each row, how many of its last tokens are to be scored.
    most: of each row, how many tokens may follow it; None asks for scores.
    until: of each row, the texts that end what follows.
    """

    rows: Sequence[Sequence[int]]
    scored: Sequence[int] = ()
    most: Sequence[int] | None = None
    until: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class _Stop:
    """The end of questions; ``reason`` is an error of the first rank, with its exit code."""

    reason: str | None = None
    exit_code: int = 0


class SharedModel:
    """This rank's part of a model whose first rank may ask.

    Args:
        tokenizer: transformers', to look for the texts that end an answer.
        ends: tokens that end an answer.
    """

    def __init__(
        self,
        model: LanguageModel,
        groups: Groups,
        tokenizer: Any,
        ends: frozenset[int],
        *,
        micro_batch_size: int,
    ) -> None:
        self._model, self._groups = model, groups
        self._tokenizer, self._ends, self._size = tokenizer, ends, micro_batch_size

    def scores(self, rows: Sequence[Sequence[int]], scored: Sequence[int]) -> list[Score]:
        """Of the last ``scored`` tokens of each row (fewer than it has); for the first rank."""
        answers: list[Score] = self._ask(_Question(rows=rows, scored=scored))
        return answers

    def continuations(
        self, rows: Sequence[Sequence[int]], most: Sequence[int], until: Sequence[Sequence[str]]
    ) -> list[list[int]]:
        """What greedy decoding adds to each row; for the first rank."""
        answers: list[list[int]] = self._ask(_Question(rows=rows, most=most, until=until))
        return answers

    def serve(self) -> None:
        """Answer until the first rank stops; for the other ranks.

        Raises:
            DistributedError: the first rank met an error.
        """
        while not isinstance(asked := self._groups.ranks.broadcast(None), _Stop):
            self._answer(asked)
        if asked.reason is not None:
            raise DistributedError(f"rank 0 failed: {asked.reason}", asked.exit_code)

    def stop(self, error: Exception | None = None) -> None:
        """Let the other ranks go, with the error this one met; for the first rank."""
        reason = None if error is None else f"{type(error).__name__}: {error}"
        self._groups.ranks.broadcast(_Stop(reason, exit_code(error) if error else 0))

    def _ask(self, question: _Question) -> list[Any]:
        self._groups.ranks.broadcast(question)
        return self._answer(question)

    def _answer(self, asked: _Question) -> list[Any]:
        groups = self._groups
        order = sorted(range(len(asked.rows)), key=lambda n: (-len(asked.rows[n]), n))
        batches = [order[at : at + self._size] for at in range(0, len(order), self._size)]
        found: dict[int, Any] = {}
        is_silent = not groups.ranks.is_first
        with tqdm(total=len(order), unit="row", disable=is_silent, file=sys.stderr) as bar:
            for number, batch in enumerate(batches):
                if number % groups.data_parallel == groups.dp_rank:
                    found.update(zip(batch, self._batch(asked, batch)))
                bar.update(len(batch))
        if groups.data_parallel > 1:
            parts: list[dict[int, Any]] = [{} for _ in range(groups.data_parallel)]
            dist.all_gather_object(parts, found, group=groups.dp_group)
            found = {number: answer for part in parts for number, answer in part.items()}
        return [found[number] for number in range(len(order))]

    def _batch(self, asked: _Question, batch: Sequence[int]) -> list[Any]:
        rows = [asked.rows[n] for n in batch]
        if asked.most is None:
            answers = []
            for n, (nats, greedy) in zip(batch, score_rows(self._model, rows, self._groups)):
                last = len(nats) - asked.scored[n]
                answers.append((sum(nats[last:]), all(greedy[last:])))
            return answers

        def is_done(at: int, tokens: Sequence[int]) -> bool:
            if tokens[-1] in self._ends:
                return True
            text = self._tokenizer.decode(tokens, skip_special_tokens=False)
            return any(end in text for end in asked.until[batch[at]])

        return continue_rows(
            self._model,
            rows,
            self._groups,
            max_new_tokens=[asked.most[n] for n in batch],
            is_done=is_done,
            sampling=Sampling(),
        )
