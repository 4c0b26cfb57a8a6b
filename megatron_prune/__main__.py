"""``python -m megatron_prune STAGE``, the form that ``torchrun -m megatron_prune`` uses."""

from megatron_prune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
