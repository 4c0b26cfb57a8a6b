"""A stranger's training checkpoint: nothing in it runs, whichever road it is read by (F11).

megatron-core 0.16 and torch's DCP unpickle ``.metadata``, what it calls bytes, cached indices and,
as the environment asks, ``common.pt``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_prune.data.sidecar import check_corpus
from megatron_prune.engine.train.corpora import build_parts, dataset_config
from tests.engine.runs import losses, words
from tests.launch import made_once
from tests.pico import Done, ok, run

SHORT = (
    *("--train-iters", 1, "--eval-iters", 0, "--save-interval", 1000, "--split", "100,0,0"),
    *("--lr-decay-iters", 6),
)
ON = (*SHORT, "--train-iters", 2)
OPTIMIZER = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"
MODEL = "decoder.layers.mlp.linear_fc2.weight"
EXTRA = "decoder.layers.mlp.linear_fc1._extra_state/shard_1_4"


class Evil:
    """Unpickled, it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, reference: Path, corpus: Path) -> Path:
    """``plain`` and ``lora``: runs of one step."""
    with made_once(tmp_path_factory, "evil-runs") as (folder, fresh):
        if fresh:
            for name, flags in (("plain", ()), ("lora", ("--lora-rank", 2))):
                ok(*words(reference / "gqa", folder / name, corpus, *SHORT, *flags))
    return folder


@pytest.fixture()
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def _entry(directory: Path, key: str, data: bytes, *, as_bytes: bool) -> None:
    """Let ``key`` of an index be ``data``: an entry of bytes, or a tensor of one chunk."""
    index = pickle.loads((directory / ".metadata").read_bytes())
    file = directory / "__0_0.distcp"
    at = file.stat().st_size
    file.write_bytes(file.read_bytes() + data)
    places = index.storage_data
    mine = [place for place in places if place.fqn == key]
    assert mine, key
    if as_bytes:
        size = getattr(index.state_dict_metadata[key], "size", None)
        index.state_dict_metadata[key] = BytesStorageMetadata()
        index.state_dict_metadata[key].size = size
        for place in mine:
            del places[place]
        places[MetadataIndex(key)] = _StorageInfo(file.name, at, len(data))
    else:
        for place in mine:
            places[place] = _StorageInfo(file.name, at, len(data))
    (directory / ".metadata").write_bytes(pickle.dumps(index))


def _vouched(directory: Path) -> None:
    """The manifest of a stranger fits what the stranger has written."""
    manifest = json.loads((directory / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (directory / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def _saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


Change = Callable[[Path, Path], None]


def _bytes_at(key: str) -> Change:
    return lambda at, canary: _entry(at, key, _saved([Evil(canary)]), as_bytes=True)


def _chunk_at(key: str) -> Change:
    return lambda at, canary: _entry(at, key, _saved(Evil(canary)), as_bytes=False)


def _common(key: str) -> Change:
    def change(directory: Path, canary: Path) -> None:
        common = torch.load(directory / "common.pt", weights_only=False)
        common[key] = Evil(canary)
        torch.save(common, directory / "common.pt")

    return change


ROADS: dict[str, tuple[str, Change]] = {
    "optimizer entry of bytes": ("plain", _bytes_at(OPTIMIZER)),
    "model entry of bytes": ("plain", _bytes_at(MODEL)),
    "optimizer chunk": ("plain", _chunk_at(OPTIMIZER)),
    "model chunk": ("plain", _chunk_at(MODEL)),
    "common.pt": ("plain", _common("optimizer")),
    "common.pt, unknown key": ("plain", _common("x")),
    "LoRA entry of bytes": ("lora", _bytes_at("decoder.layers.mlp.linear_fc2.lora_A")),
    "LoRA optimizer": (
        "lora",
        _bytes_at("optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.lora_A"),
    ),
    "LoRA chunk": ("lora", _chunk_at("decoder.layers.mlp.linear_fc2.lora_B")),
}


@pytest.fixture()
def strange(made: Path, tmp_path: Path, canary: Path) -> Callable[[str, Change], Path]:
    def make(kind: str, change: Change) -> Path:
        save = Path(shutil.copytree(made / kind, tmp_path / "run"))
        (directory,) = save.glob("iter_*")
        change(directory, canary)
        _vouched(directory)
        return save

    return make


def _refused(done: Done, canary: Path) -> None:
    assert not canary.exists(), "the payload ran"
    assert done.code in (2, 3) and "Traceback" not in done.err, done


@pytest.mark.parametrize("road", ROADS)
def test_nothing_runs_when_a_strangers_run_is_continued(
    road: str,
    strange: Callable[[str, Change], Path],
    corpus: Path,
    tmp_path: Path,
    canary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, change = ROADS[road]
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # megatron-core's common.pt obeys
    evil, flags = strange(kind, change), ("--lora-rank", 2) if kind == "lora" else ()
    _refused(run(*words(evil, tmp_path / "mine", corpus, *ON, *flags)), canary)
    _refused(run(*words("/nowhere", evil, corpus, *ON, *flags)), canary)  # continued where it lies


@pytest.mark.parametrize("data", ["bytes", "tensor"])
def test_extra_state_is_not_opened_and_does_not_matter(
    data: str,
    made: Path,
    strange: Callable[[str, Change], Path],
    corpus: Path,
    tmp_path: Path,
    canary: Path,
) -> None:
    """Transformer Engine unpickles what it is given, were it a plain tensor of bytes."""
    pickled = torch.frombuffer(bytearray(pickle.dumps(Evil(canary))), dtype=torch.uint8)
    saved = _saved([Evil(canary)]) if data == "bytes" else _saved([pickled])
    evil = strange("plain", lambda at, _: _entry(at, EXTRA, saved, as_bytes=True))
    ok(*words(evil, tmp_path / "mine", corpus, *ON))
    ok(*words(made / "plain", tmp_path / "theirs", corpus, *ON))
    assert not canary.exists()
    assert losses(tmp_path / "mine") == losses(tmp_path / "theirs")


@pytest.mark.parametrize("road", ["model entry of bytes", "model chunk", "common.pt, unknown key"])
def test_nothing_runs_when_a_stranger_teaches(
    road: str,
    strange: Callable[[str, Change], Path],
    reference: Path,
    corpus: Path,
    tmp_path: Path,
    canary: Path,
) -> None:
    evil = strange(*ROADS[road])
    flags = (*SHORT, "--teacher", evil)
    _refused(run(*words(reference / "gqa", tmp_path / "mine", corpus, *flags)), canary)


def test_no_cached_index_is_unpickled(
    strange: Callable[[str, Change], Path], corpus: Path, canary: Path
) -> None:
    def poison(cache: Path) -> None:
        for file in cache.glob("*_index.npy"):
            file.write_bytes(pickle.dumps(Evil(canary)))

    save = strange("plain", lambda at, _: poison(at.parent / ".cache"))
    ok(*words("/nowhere", save, corpus, *ON))  # built anew
    poison(save / ".cache")  # by one who is quicker than the look at them
    facts = check_corpus(str(corpus), None, 379)
    config = dataset_config(
        seed=5, seq_length=32, split="100,0,0", cache=save / ".cache", eod_mask_loss=False,
        vocab_size=379, eod=facts.eod, blend=([facts.prefix], None),
    )  # fmt: skip
    config.split_matrix = [config.split_matrix[0], None, None]
    with pytest.raises(ValueError, match="pickled"):
        build_parts(config, [8, 0, 0])
    assert not canary.exists()
