"""How a model is passed on: the origin that its card names, and the upload of an export."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_prune.errors import ConfigError, StorageError
from megatron_prune.flags import Group, flag
from megatron_prune.ranks import is_first_rank
from megatron_prune.stages.console import Console
from megatron_prune.stages.writing import Written
from megatron_prune.store.hub import check_hub, push
from megatron_prune.store.model_card import check_hub_name

PASSING_ON = Group("passing it on")


@dataclass(frozen=True, kw_only=True)
class Publishing:
    """Of a stage that writes a checkpoint which others may get."""

    base_model: str | None = flag(
        "hub name that README.md links as the origin (default: what the source says)",
        default=None,
        group=PASSING_ON,
        metavar="NAME",
    )
    push_to_hub: str | None = flag(
        "upload the Hugging Face directory once it is whole",
        default=None,
        group=PASSING_ON,
        metavar="REPO_ID",
    )
    private: bool = flag("make that repository private", default=False, group=PASSING_ON)

    def check_publishing(self, to: str) -> None:
        """Refuse what cannot be published, before anything is opened; the first rank asks the hub.

        Args:
            to: the target's format, ``hf`` or another.

        Raises:
            ConfigError: another format, a name that is none, or see `check_hub`.
        """
        for name, value in (("base-model", self.base_model), ("push-to-hub", self.push_to_hub)):
            if value is not None:
                check_hub_name(f"--{name}", value)
        if self.push_to_hub is None:
            if self.private:
                raise ConfigError("--private goes with --push-to-hub")
            return
        if to != "hf":
            raise ConfigError(
                "--push-to-hub goes with --to hf; a Megatron checkpoint is not uploaded"
            )
        if is_first_rank():
            check_hub(self.push_to_hub, private=self.private)

    def publish(self, written: Written, console: Console) -> Written:
        """Upload what was written, from the first rank; not after a ``--dry-run``.

        Raises:
            StorageError: see `push`.
        """
        if self.push_to_hub is None or written.seconds is None or not is_first_rank():
            return written
        try:
            where = push(written.path, self.push_to_hub, private=self.private)
        except StorageError:
            console.show(str(written))  # for it is there
            raise
        return replace(written, pushed=where)
