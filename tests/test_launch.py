"""The processes that tests start: as fresh as new ones, and waited for as long as they get on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests import launch

_FACTS = """
import json, os, random, sys, threading, multiprocessing as mp
def twice(number, queue):
    queue.put(2 * number)
if __name__ == "__main__":
    import torch, numpy as np
    queue = mp.get_context("spawn").Queue()
    child = mp.get_context("spawn").Process(target=twice, args=(4, queue))
    child.start()
    facts = {
        "argv": sys.argv[1:], "variable": os.environ.get("TOLD"), "cwd": os.getcwd(),
        "is-own-session": os.getsid(0) == os.getpid(), "threads": threading.active_count(),
        "joined": torch.distributed.is_initialized(), "spawned": queue.get(),
        "drawn": [random.random(), float(np.random.random()), torch.initial_seed()],
        "open": sorted(os.listdir("/proc/self/fd"), key=int)[:3],
        "imported": "megatron" in sys.modules,
    }
    child.join()
    print(json.dumps(facts))
    sys.exit(7)
"""


def _facts(tmp_path: Path) -> dict:
    (tmp_path / "facts.py").write_text(_FACTS)
    program = {"file": str(tmp_path / "facts.py")}
    done = launch.fork_and_wait(program, "a", tmp_path, cwd=tmp_path, TOLD="yes")
    assert done.returncode == 7 and done.stderr == "", done
    return json.loads(done.stdout)


def test_a_forked_process_is_as_a_new_one_but_for_its_imports(tmp_path: Path) -> None:
    found, again = _facts(tmp_path), _facts(tmp_path)
    drawn, other = found.pop("drawn"), again.pop("drawn")
    assert found == again == {
        "argv": ["a", str(tmp_path)], "variable": "yes", "cwd": str(tmp_path),
        "is-own-session": True, "threads": 1, "joined": False, "spawned": 8,
        "open": ["0", "1", "2"], "imported": True,
    }  # fmt: skip
    assert drawn[0] != other[0] and drawn[1] != other[1], "siblings draw the same numbers"
    assert drawn[2] == other[2], "torch begins with one seed in every new process"
    assert "TOLD" not in os.environ


def test_each_way_to_end_has_its_code(tmp_path: Path) -> None:
    ends = {
        "pass": 0, "raise SystemExit(3)": 3, "1 / 0": 1, "import os; os.kill(os.getpid(), 9)": -9,
        "import os, signal; os.kill(os.getpid(), signal.SIGINT)": -signal.SIGINT,
    }  # fmt: skip
    found = {code: launch.fork_and_wait({"code": code}) for code in ends}
    assert {code: done.returncode for code, done in found.items()} == ends
    assert "ZeroDivisionError" in found["1 / 0"].stderr


def test_a_silent_process_is_ended_and_what_it_said_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SILENT_SECONDS", 2)
    code = "import time\nprint('the last word', flush=True)\ntime.sleep(1000)"
    said = tmp_path / "out", tmp_path / "err"
    process = launch.fork({"code": code}, (), said)
    with pytest.raises(AssertionError, match="nothing heard for 2 s; said before:\n.*the last"):
        process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("work", ["sum(range(10**5))", "print('.', flush=True); time.sleep(0.1)"])
def test_a_process_that_computes_or_talks_is_waited_for(
    work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SILENT_SECONDS", 2)
    monkeypatch.setattr(launch, "CPU_SECONDS", 0.05)
    code = f"import time\nsince = time.monotonic()\nwhile time.monotonic() - since < 6:\n    {work}"
    assert launch.fork_and_wait({"code": code}).returncode == 0


def test_a_variable_that_is_read_at_import_takes_a_new_process(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="HF_HOME"):
        launch.fork_and_wait({"code": "pass"}, HF_HOME=str(tmp_path))
