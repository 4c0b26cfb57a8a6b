"""The program: ``megatron-prune STAGE``, and ``torchrun -m megatron_prune STAGE``."""

import os
import sys
from typing import NoReturn

from megatron_prune.cli import main
from megatron_prune.errors import DistributedError
from megatron_prune.ranks import end_with_launcher


def run() -> NoReturn:
    """`main`, and the end of the process with its exit code."""
    end_with_launcher()
    code = main()
    if code == DistributedError.exit_code:
        # taking down what talks to a lost rank can take long, or wait for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    run()
