"""Telling how training goes: JSON lines, TensorBoard, a line or a bar on standard error.

``metrics.jsonl`` has one object a logged iteration and one a validation; together with the
checkpoints it is cut back to the iteration that training continues from, so every iteration stands
there once, whatever happened in between.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_prune import __version__
from megatron_prune.engine.objectives.objective import LM_LOSS
from megatron_prune.files import flush_file, open_to_append, replace_file
from megatron_prune.files.parsing import parse_json
from megatron_prune.sources.source import COMMANDS

METRICS = "metrics.jsonl"
_COUNTS = ("iteration", "consumed-samples", "consumed-tokens", "seconds", "skipped-iterations")


def record_command(save: Path, argv: Sequence[str], *, iteration: int, processes: int) -> None:
    """Add a line to ``commands.jsonl``: what was started, from which iteration on, by how many."""
    save.mkdir(parents=True, exist_ok=True)
    row = {"iteration": iteration, "processes": processes, "argv": list(argv)}
    with open_to_append(save / COMMANDS) as file:
        file.write(json.dumps({**row, "version": __version__}) + "\n")


def _rows_until(path: Path, iteration: int) -> list[str]:
    """The lines up to an iteration; what a kill has cut short is dropped."""
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = parse_json(line)
            if row["iteration"] <= iteration:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


class MetricsLog:
    """The metrics of one run; does something on the rank that ``active`` is true on."""

    def __init__(
        self,
        save: Path,
        tensorboard: Path,
        *,
        losses: Sequence[str],
        start: int,
        train_iters: int,
        active: bool,
    ) -> None:
        self.active, self._losses = active, losses
        self._train_iters, self._start, self._began = train_iters, start, time.monotonic()
        self._bar: tqdm[Any] | None = None
        if not active:
            return
        path = save / METRICS
        if path.exists():
            rows = _rows_until(path, start)
            replace_file(path, "".join(row + "\n" for row in rows).encode())
        self._file = open_to_append(path)
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(tensorboard), purge_step=start + 1)
        if sys.stderr.isatty():
            self._bar = tqdm(total=train_iters, initial=start, unit="step", file=sys.stderr)

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def training(self, row: dict[str, Any]) -> None:
        """A logged iteration. Keys: iteration, lm loss, learning-rate, grad-norm, ...; numbers
        stand on the board, what is made of several only in the row."""
        if not self.active:
            return
        self._write(row)
        iteration, samples = row["iteration"], row["consumed-samples"]
        named = (*self._losses, "learning-rate", "grad-norm", "batch-size", "loss-scale")
        for name in named:
            if row.get(name) is not None:
                self._board.add_scalar(name, row[name], iteration)
                self._board.add_scalar(f"{name} vs samples", row[name], samples)
        self._board.add_scalar("iteration-time", row["seconds"], iteration)
        for name, value in row.items():  # tokens-per-second, and what an objective tells
            if name not in (*named, *_COUNTS) and isinstance(value, int | float):
                self._board.add_scalar(name, value, iteration)
        self._tell(row)

    def validation(self, iteration: int, samples: int, loss: float) -> None:
        """The validation loss after an iteration."""
        if not self.active:
            return
        perplexity = math.exp(min(20.0, loss))  # as Megatron caps it
        self._write({"iteration": iteration, "validation loss": loss, "validation ppl": perplexity})
        for name, value in (("lm loss validation", loss), ("lm loss validation ppl", perplexity)):
            self._board.add_scalar(name, value, iteration)
            self._board.add_scalar(f"{name} vs samples", value, samples)
        self.say(f"iteration {iteration}: validation loss {loss:.4f}, ppl {perplexity:.3f}")

    def domains(self, iteration: int, samples: int, table: dict[str, dict[str, float]]) -> None:
        """What is known of each domain: loss, target, weight, tokens, token share, epochs."""
        if not self.active:
            return
        named = {
            f"domain {what}/{name}": x for name, row in table.items() for what, x in row.items()
        }
        self._write({"iteration": iteration, "consumed-samples": samples, **named})
        for name, x in named.items():
            self._board.add_scalar(name, x, iteration)
        for name, row in table.items():
            self.say(
                f"iteration {iteration}: domain {name}: loss {row['loss']:.4f}, "
                f"weight {row['weight']:.4f}, share so far {row['token share']:.4f}"
            )

    def _tell(self, row: dict[str, Any]) -> None:
        done = row["iteration"] - self._start
        left = (time.monotonic() - self._began) / done * (self._train_iters - row["iteration"])
        clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
        norm = "-" if row["grad-norm"] is None else f"{row['grad-norm']:.3f}"
        loss = "-" if row["lm loss"] is None else f"{row['lm loss']:.4f}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss}, {row['tokens-per-second']:.0f} tokens/s")
            return
        self.say(
            f"iteration {row['iteration']}/{self._train_iters}: lm loss {loss}, "
            f"learning rate {row['learning-rate']:.3e}, grad norm {norm}, "
            f"{row['tokens-per-second']:.0f} tokens/s, {clock} left"
        )

    def say(self, text: str) -> None:
        """A line on standard error, from one rank."""
        if self.active:
            tqdm.write(text, file=sys.stderr)

    def sync(self) -> None:
        """Flush to disk: a checkpoint must not be newer than its metrics."""
        if self.active:
            flush_file(self._file)

    def close(self) -> None:
        if self.active:
            self._file.close()
            self._board.close()
            if self._bar is not None:
                self._bar.close()


class StepLosses:
    """The losses of the steps since the last logged iteration."""

    def __init__(self, names: Sequence[str], state: Mapping[str, Any]) -> None:
        """``names``: of those beside the language-model loss; ``state``: a checkpoint's."""
        self._names = names
        self._lm = list(state.get("losses", []))
        steps = state.get("taught losses", [])
        self._others = [list(step) for step in steps if len(step) == len(names)]

    def add(self, loss: float, others: Sequence[float] | None) -> None:
        """One more step; ``others`` is None when the step was wrong."""
        self._lm.append(loss)
        if self._names and others is not None:
            self._others.append(list(others))

    def __len__(self) -> int:
        return len(self._lm)

    def take_means(self) -> dict[str, float | None]:
        """By name; None for a language-model loss that was never a number."""
        finite = [loss for loss in self._lm if math.isfinite(loss)]
        means = {name: sum(all) / len(all) for name, all in zip(self._names, zip(*self._others))}
        self._lm, self._others = [], []
        return {LM_LOSS: sum(finite) / len(finite) if finite else None, **means}

    def state(self) -> dict[str, Any]:
        """The keys in the checkpoint, the second of a run that has other losses."""
        others = {"taught losses": [list(step) for step in self._others]} if self._names else {}
        return {"losses": list(self._lm), **others}


class Lapse:
    """Time and samples since the last logged iteration, without validation and saving."""

    def __init__(self, consumed: int) -> None:
        self.restart(consumed)

    def restart(self, consumed: int) -> None:
        self._since, self._from = time.monotonic(), consumed

    def take(self, consumed: int) -> tuple[float, int]:
        now = time.monotonic()
        seconds, samples = max(now - self._since, 1e-9), consumed - self._from
        self.restart(consumed)
        return seconds, samples
