"""Processes that a test starts: ranks that share a rendezvous, as torchrun's do, and single ones.

They are forked from a process that has imported everything (`tests.fork_server`; each pytest worker
has one), which takes milliseconds where a new one takes eight seconds of a core. What is tested
of a start itself (torchrun, ``python -m``, variables that are read at import) takes a new process.
No limit here is one of time: processes are waited for as long as they get on.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
# Processes that have said nothing and spent less than this in so long a time have hung: those that
# wait for one another look around for less, those that compute get more on the busiest machine.
SILENT_SECONDS, CPU_SECONDS = 120, 1
# Read when a module is imported: a forked process is too late for another value.
READ_AT_IMPORT = ("OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "PYTHONHASHSEED")

PROGRAM = {"module": "megatron_prune"}
# Taking a whole interpreter apart takes as long as some stages: these two end without.
COMMAND = {
    "code": """
import os, sys
from megatron_prune.cli import main
code = main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""
}
_STAGES = """
import json, os, sys
from megatron_prune.cli import main
from tests.launch import free_groups
prelude, stages = json.loads(sys.argv[1])
exec(prelude)
codes = []
for port, argv in stages:
    os.environ["MASTER_PORT"] = str(port)
    codes.append(main(argv))
    free_groups()
print("codes", json.dumps(codes), flush=True)
sys.stderr.flush()
os._exit(0)
"""


@contextmanager
def made_once(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """A folder that all of xdist's workers share, and whether this one has to fill it."""
    shared = factory.getbasetemp()
    shared = shared.parent if shared.name.startswith("popen-") else shared
    folder = shared / name
    with FileLock(f"{folder}.lock"):
        if fresh := not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed to
            folder.mkdir()
        yield folder, fresh
        (folder / "made").touch()


@cache
def _ports() -> Iterator[int]:
    """This worker's own, each once, below those the system gives to outgoing connections: where two
    launches meet on one port, ranks of one find the store of the other."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    mine = range(12_000 + worker, 32_000, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    return iter(random.SystemRandom().sample(mine, len(mine)))


def free_port() -> int:
    """A port that nothing listens on, and no other launch was given."""
    for port in _ports():
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("every port was given")


def free_groups() -> None:
    """Free the process groups of a command that has run in this process and ended.

    torch counts groups, also those that a rank could not join, and names the next rendezvous by the
    number: ranks that have failed differently would not find each other any more.

    Cycles hold them until Python's next full collection, and a cache in Megatron one of each model.
    Each has threads of gloo that wake up a hundred times a second: a test process came to 800.
    """
    if module := sys.modules.get("megatron.core.models.common.embeddings.rotary_pos_embedding"):
        module.RotaryEmbedding.forward.cache_clear()
    if module := sys.modules.get("torch.distributed.distributed_c10d"):
        module._world.group_count = 0
    if len(os.listdir("/proc/self/task")) > 8:
        gc.collect()


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds the package and these tests wherever it starts."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **more}


class _Server:
    """The process that forks."""

    def __init__(self) -> None:
        questions, self._asking = os.pipe()
        self._answers, answers = os.pipe()
        self.environment = environment()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(questions), str(answers)],
            env={**self.environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},  # a look spoils no fork
            stdin=subprocess.DEVNULL, pass_fds=(questions, answers), cwd=ROOT,
        )  # fmt: skip
        os.close(questions)
        os.close(answers)
        self._reading = os.fdopen(self._answers)

    def ask(self, **question: Any) -> Any:
        os.write(self._asking, json.dumps(question).encode() + b"\n")
        return json.loads(self._reading.readline())

    def close(self) -> None:
        os.close(self._asking)
        self._reading.close()
        self._process.wait()


@cache
def _server() -> _Server:
    return _Server()


def close() -> None:
    """End the process that forks, and all that a test has left running."""
    if _server.cache_info().currsize:
        _server().close()
        _server.cache_clear()


@dataclass
class Process:
    """A forked process, used as `subprocess.Popen` is; ``said``: the files it writes to."""

    pid: int
    said: tuple[Path, Path]
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _server().ask(wait=self.pid)
        return self.returncode

    def wait(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        return wait([self])[0]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Kill it and all that it started, and wait for it."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.kill()
        while self.poll() is None:
            time.sleep(0.001)


def seconds_of_a_core(pid: int) -> float:
    """Of a process and of those it has waited for."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK")


def until(
    is_done: Callable[[], bool], processes: Sequence[Process], pause_seconds: float = 0.005
) -> None:
    """Wait for ``is_done`` for as long as the processes get on: end, compute or say something."""
    heard, since, looked = None, 0.0, 0.0
    while not is_done():
        time.sleep(pause_seconds)
        if (now := time.monotonic()) - looked < 1:
            continue
        looked = now
        running = [process for process in processes if process.poll() is None]
        said = sum(path.stat().st_size for process in processes for path in process.said)
        cpu = sum(seconds_of_a_core(process.pid) for process in running)
        if heard is None or heard[:2] != (len(running), said) or cpu >= heard[2] + CPU_SECONDS:
            heard, since = (len(running), said, cpu), now
        if now - since > SILENT_SECONDS:
            for process in processes:
                process.end()
            texts = {path: path.read_text() for process in processes for path in process.said}
            last = "\n".join(f"{path}: {text[-2000:]}" for path, text in texts.items())
            raise AssertionError(f"nothing heard for {SILENT_SECONDS} s; said before:\n{last}")


def wait(processes: Sequence[Process]) -> list[int]:
    """The exit codes, when all have ended."""
    until(lambda: all(process.poll() is not None for process in processes), processes)
    return [process.returncode for process in processes if process.returncode is not None]


def fork(
    program: dict[str, str],
    words: Sequence[object],
    said: tuple[Path, Path],
    *,
    cwd: Path | None = None,
    largest_file: int | None = None,
    **variables: str,
) -> Process:
    """A process of its own.

    Args:
        program: a ``module`` as for ``python -m``, a ``file`` or ``code`` as for ``python -c``.
        said: the files of its output and of its errors, which it appends to.
        largest_file: bytes that a file of it can have.
        variables: of the environment, beside this process's.
    """
    environ, server = environment(**variables), _server()
    changed = [n for n in READ_AT_IMPORT if environ.get(n) != server.environment.get(n)]
    assert not changed, f"{changed}: read at import, start a new process"
    for path in said:
        path.touch()
    out, err = map(str, said)
    pid = server.ask(
        program=program, words=[str(word) for word in words], out=out, err=err,
        environment=environ, cwd=str(cwd or os.getcwd()), largest_file=largest_file,
    )  # fmt: skip
    return Process(pid, said)


def fork_ranks(
    program: dict[str, str],
    words: Sequence[Sequence[object]],
    said: Sequence[tuple[Path, Path]],
    largest_file: int | None = None,
) -> list[Process]:
    """One process a rank, as torchrun would start them; ``words`` and ``said``: of each."""
    place = {"WORLD_SIZE": str(len(words)), "MASTER_ADDR": "127.0.0.1"}
    place["MASTER_PORT"] = str(free_port())
    return [
        fork(
            program, mine, files, largest_file=largest_file, RANK=str(rank), LOCAL_RANK=str(rank),
            **place,
        )
        for rank, (mine, files) in enumerate(zip(words, said))
    ]  # fmt: skip


def installed_script() -> str:
    """What the installed ``megatron-prune`` does, by pyproject.toml."""
    said = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'^megatron-prune = "(\S+):(\w+)"$', said, re.MULTILINE)
    assert found
    module, name = found.groups()
    return f"import sys\nfrom {module} import {name}\nif __name__ == '__main__': sys.exit({name}())"


def start(
    words: Sequence[object],
    ranks: int,
    said: Path,
    *,
    prelude: str | None = None,
    largest_file: int | None = None,
) -> list[Process]:
    """A command as torchrun would start it, to be disturbed while it runs.

    Args:
        said: the file that all ranks write to.
        prelude: code that every rank runs before `installed_script`; None: ``python -m`` runs.
    """
    program = PROGRAM if prelude is None else {"code": f"{prelude}\n{installed_script()}"}
    return fork_ranks(program, [words] * ranks, [(said, said)] * ranks, largest_file)


def fork_and_wait(
    program: dict[str, str], *words: object, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """One process and how it ended, as `subprocess.run` tells it."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "out", Path(folder) / "err"
        code = fork(program, words, said, cwd=cwd, **variables).wait()
        return subprocess.CompletedProcess(words, code, *(path.read_text() for path in said))


@dataclass(frozen=True)
class RankDone:
    """How one rank ended: the exit code of each stage it got to, and what it said."""

    codes: list[int]
    out: str
    err: str


def launch(
    processes: int,
    *stages: Sequence[object],
    prelude: str = "",
    instead: dict[int, Sequence[object]] | None = None,
) -> list[RankDone]:
    """Run ``stages`` on every rank, each with a rendezvous of its own.

    Args:
        prelude: code that every process runs first; it can look at ``os.environ["RANK"]``.
        instead: rank -> a stage that it runs in place of all ``stages``.
    """
    ports, words = [free_port() for _ in stages], []
    for rank in range(processes):
        mine = [(instead or {}).get(rank, argv) for argv in stages]
        texts = [[port, [str(word) for word in argv]] for port, argv in zip(ports, mine)]
        words.append([json.dumps([prelude, texts])])
    with tempfile.TemporaryDirectory() as folder:
        said = [(Path(folder) / f"{n}.out", Path(folder) / f"{n}.err") for n in range(processes)]
        wait(fork_ranks({"code": _STAGES}, words, said))
        return [_rank_done(out.read_text(), err.read_text()) for out, err in said]


def _rank_done(out: str, err: str) -> RankDone:
    last = out.strip().splitlines()[-1:] or [""]
    codes = json.loads(last[0][6:]) if last[0].startswith("codes ") else []
    return RankDone(codes, out, err)
