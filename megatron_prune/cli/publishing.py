"""How a model is passed on: the origin that its card names, and the upload of an export."""

from __future__ import annotations

import argparse

from megatron_prune.cli import options
from megatron_prune.errors import ConfigError
from megatron_prune.ranks import is_first_rank
from megatron_prune.store.hub import check_hub, push
from megatron_prune.store.model_card import check_hub_name


def add_publishing_arguments(parser: argparse.ArgumentParser) -> None:
    """``--base-model``, ``--push-to-hub`` and ``--private``."""
    group = parser.add_argument_group("passing it on")
    group.add_argument(
        "--base-model",
        metavar="NAME",
        help="hub name that README.md links as the origin (default: what the source says)",
    )
    group.add_argument(
        "--push-to-hub",
        metavar="REPO_ID",
        help="upload the Hugging Face directory once it is whole",
    )
    group.add_argument("--private", action="store_true", help="make that repository private")


def check_publishing(args: argparse.Namespace) -> None:
    """Refuse what cannot be published, before anything is opened; the first rank asks the hub.

    Raises:
        ConfigError: another format, a name that is none, or see `check_hub`.
    """
    for name in ("base_model", "push_to_hub"):
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if value is not None:
            check_hub_name(flag, value)
    if args.push_to_hub is not None and args.to != "hf":
        raise ConfigError("--push-to-hub goes with --to hf; a Megatron checkpoint is not uploaded")
    if args.private and args.push_to_hub is None:
        raise ConfigError("--private goes with --push-to-hub")
    if args.push_to_hub is not None and is_first_rank():
        check_hub(args.push_to_hub, private=args.private)


def publish(args: argparse.Namespace) -> None:
    """Upload what was written, from the first rank.

    Raises:
        StorageError: see `push`.
    """
    if args.push_to_hub is None or args.dry_run or not is_first_rank():
        return
    where = push(args.save, args.push_to_hub, private=args.private)
    options.show(f"pushed {args.save}: {where}")
