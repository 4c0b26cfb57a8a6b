"""Short training runs of a pico model, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_prune.model import axes
from megatron_prune.store import open_source

SHORT = [
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--seq-length", "32"),
    *("--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine", "--lr-warmup-iters", "2"),
    *("--train-iters", "6", "--save-interval", "3", "--log-interval", "1", "--seed", "5"),
    *("--eval-interval", "3", "--eval-iters", "1", "--split", "80,20,0"),
]

_INDEX = ("document", "sample", "shuffle")


def words(load: object, save: object, corpus: object, *more: object) -> list[str]:
    """``train`` of a pico model; later flags win over the short run's own."""
    start = ["--load", str(load), "--save", str(save), "--data-path", str(corpus)]
    return ["train", *start, *SHORT, *map(str, more)]


def rows(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def losses(save: Path) -> dict[int, float]:
    """Iteration -> training loss; every iteration stands there once, in order."""
    found = [(row["iteration"], row["lm loss"]) for row in rows(save) if "lm loss" in row]
    assert [n for n, _ in found] == sorted({n for n, _ in found}), found
    return dict(found)


def told(save: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if "seconds" not in key and "-per-" not in key}
        for row in rows(save)
    ]


def weights(save: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, by canonical name, read without Megatron."""
    source = open_source(save)
    return {name: source.read(name).clone() for name in axes.names(source.config)}


def batches(save: Path, corpus: Path) -> list[Tensor]:
    """[4, 33] tokens of each of the six steps of `SHORT`, from the run's own index of samples."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    index = {name: next(save.glob(f".cache/*-train-{name}_index.npy")) for name in _INDEX}
    documents, samples, shuffle = (np.load(index[name]) for name in _INDEX)
    data = IndexedDataset(str(corpus))
    tokens = np.concatenate([data[int(number)] for number in documents]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum([len(data[int(number)]) for number in documents])])
    begins = [starts[samples[shuffle[i]][0]] + samples[shuffle[i]][1] for i in range(24)]
    rows = torch.stack([torch.from_numpy(tokens[at : at + 33]) for at in begins])
    return list(rows.view(6, 4, 33))
