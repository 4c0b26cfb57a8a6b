"""``python -m megatron_prune STAGE``, the form that ``torchrun -m megatron_prune`` uses."""

import os
import sys

from megatron_prune.cli import main
from megatron_prune.errors import DistributedError

if __name__ == "__main__":
    code = main()
    if code == DistributedError.exit_code:
        # taking down what talks to a lost rank can take long, or wait for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
