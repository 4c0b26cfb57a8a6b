"""A process that has imported everything, and forks a fresh one for each that a test wants.

A new process spends eight seconds of a core on importing torch, Megatron and transformers, a forked
one some milliseconds; it is as new in all else: this process has one thread, no process group, no
random number drawn and nothing of a test in it. `tests.launch` starts it and talks to it, one line
of JSON a question.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing.process
import os
import pkgutil
import random
import resource
import runpy
import signal
import sys
import warnings
from types import ModuleType
from typing import Any

import numpy as np

CPU_SECONDS = 600  # no rank of a test needs that; one that loops without end does


def _import_all() -> None:
    """Everything of the product but its program, which runs in each process anew."""
    import transformers

    import emb_pruner
    import megatron_prune

    for package in (megatron_prune, emb_pruner):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(("__main__", "harness_model")):  # lm_eval is an extra
                importlib.import_module(module.name)
    _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer  # imported when asked for


def _become(asked: dict[str, Any]) -> None:
    """In a forked process: what a new one finds when it starts."""
    os.setsid()  # so that all that it starts can be ended with it
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    multiprocessing.process.ORIGINAL_DIR = asked["cwd"]
    for name, handle in (("out", 1), ("err", 2)):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), handle)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    if asked["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["largest_file"],) * 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    np.random.seed()
    sys.argv = ["-", *asked["words"]]


def _run(program: dict[str, str]) -> None:
    """As ``python -m MODULE``, ``python FILE`` and ``python -c CODE`` do."""
    if "module" in program:
        runpy.run_module(program["module"], run_name="__main__", alter_sys=True)
    elif "file" in program:
        sys.argv[0] = program["file"]
        sys.path[0] = os.path.dirname(program["file"])
        runpy.run_path(program["file"], run_name="__main__")
    else:
        sys.argv[0] = "-c"
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(program["code"], main.__dict__)


def _serve(questions: int, answers: int) -> dict[str, Any] | None:
    """Fork and wait as told; returns in each forked process, and None at the end."""
    children: set[int] = set()
    with os.fdopen(questions) as asking, os.fdopen(answers, "w") as answering:
        for line in asking:
            asked = json.loads(line)
            if "wait" in asked:
                pid, status = os.waitpid(asked["wait"], os.WNOHANG)
                children.discard(pid)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            else:
                threads = os.listdir("/proc/self/task")
                assert len(threads) == 1, "a thread of this process would be missing in a fork"
                answer = os.fork()
                if answer == 0:
                    return asked
                children.add(answer)
            print(json.dumps(answer), file=answering, flush=True)
    for child in children:  # of a test process that ended without waiting for them
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    with warnings.catch_warnings(action="ignore"):
        _import_all()
    gc.collect()
    gc.freeze()
    if (wanted := _serve(*map(int, sys.argv[1:]))) is not None:
        _become(wanted)
        _run(wanted["program"])
