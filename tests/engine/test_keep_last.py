"""F24: what ``--keep-last`` removes, and what it must not: the pointed-to, and what is read."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

from megatron_prune.engine.train.checkpoint import is_complete
from megatron_prune.model import axes
from megatron_prune.store import open_source
from tests.engine.runs import told, weights, words
from tests.launch import start
from tests.pico import ok, tensors

ROTATE = ("--save-interval", 1, "--keep-last", 1, "--eval-iters", 0)


def _names(save: Path) -> list[str]:
    return sorted(path.name for path in save.glob("*iter_*"))


def _pointed(save: Path) -> Path:
    word = (save / "latest_checkpointed_iteration.txt").read_text()
    return save / f"iter_{int(word):07d}"


def test_readers_of_a_run_that_rotates_get_whole_checkpoints(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    save, whole = tmp_path / "run", tmp_path / "whole"
    flags = (*ROTATE, "--train-iters", 15)
    ok(*words(reference / "gqa", whole, corpus, *flags, "--keep-last", 15))
    name = "model.layers.0.mlp.up_proj.weight"  # changes with every step, as all do
    wanted = {}
    for path in whole.glob("iter_*"):
        ok("convert", "--load", path, "--save", tmp_path / path.name, "--to", "hf")
        wanted[tensors(tmp_path / path.name)[name].numpy().tobytes()] = tmp_path / path.name
    assert len(wanted) == 15
    (process,) = start(words(reference / "gqa", save, corpus, *flags), 1, tmp_path / "said.txt")
    seen = set()
    for number in itertools.count():
        ended = process.poll() is not None
        if (save / "latest_checkpointed_iteration.txt").exists():
            out = tmp_path / f"read-{number}"
            ok("convert", "--load", save, "--save", out, "--to", "hf")
            found = tensors(out)
            of = wanted[found[name].numpy().tobytes()]
            assert all((x == found[key]).all() for key, x in tensors(of).items()), "mixed"
            seen.add(of.name)
        if ended:
            break
    assert process.returncode == 0, (tmp_path / "said.txt").read_text()
    assert len(seen) > 3, "the readers met no rotation"


def test_a_checkpoint_that_is_read_is_left_to_the_next_save(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    save = tmp_path / "run"
    command = words(reference / "gqa", save, corpus, *ROTATE)
    ok(*command, "--exit-interval", 2)
    source = open_source(save)
    ok(*command, "--exit-interval", 4)
    assert _names(save) == ["iter_0000002", "iter_0000004"]
    assert all(source.read(name).isfinite().all() for name in axes.names(source.config))
    source.close()
    ok(*command)
    assert _names(save) == ["iter_0000006"] == [_pointed(save).name]


def test_the_pointed_to_stays_beside_newer_ones_that_are_damaged(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    """Two of higher numbers: by number alone they would be the last that are kept."""
    save = tmp_path / "run"
    command = words(reference / "gqa", save, corpus, *ROTATE)
    ok(*command, "--exit-interval", 3)
    for name in ("iter_0000098", "iter_0000099"):
        (save / name).mkdir()
        (save / name / "__0_0.distcp").write_bytes(b"half")
    (save / "latest_checkpointed_iteration.txt").write_text("99")
    for stop in (4, 5):
        ok(*command, "--exit-interval", stop)
        assert _pointed(save).name == f"iter_000000{stop}" and is_complete(_pointed(save))
    ok(*words(reference / "gqa", tmp_path / "whole", corpus, *ROTATE))
    ok(*command)
    assert told(save) == told(tmp_path / "whole")


KILL = """
import os, shutil
from pathlib import Path
remove = shutil.rmtree
def kill(path, *args, **more):
    if Path(path).name.endswith(".dropped"):
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        files[len(files) // 2].unlink()
        os.kill(os.getpid(), 9)
    return remove(path, *args, **more)
shutil.rmtree = kill
"""


def test_a_kill_in_the_middle_of_removing_leaves_the_newest_and_is_swept(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    save = tmp_path / "run"
    command = words(reference / "gqa", save, corpus, *ROTATE)
    (process,) = start(command, 1, tmp_path / "said.txt", prelude=KILL)
    assert process.wait() == -signal.SIGKILL
    assert _names(save) == [".iter_0000001.tmp.dropped", "iter_0000002"]
    assert _pointed(save).name == "iter_0000002"
    ok("convert", "--load", save, "--save", tmp_path / "hf", "--to", "hf")
    ok(*command)
    assert _names(save) == ["iter_0000006"]
    ok(*words(reference / "gqa", tmp_path / "whole", corpus, *ROTATE))
    assert told(save) == told(tmp_path / "whole")
    ours, theirs = weights(save), weights(tmp_path / "whole")
    assert all((ours[name] == theirs[name]).all() for name in theirs)
