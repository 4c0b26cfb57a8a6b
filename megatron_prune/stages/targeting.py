"""As what a stage writes a model: format, layout, dtype, size of files."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.errors import ConfigError
from megatron_prune.flags import flag
from megatron_prune.model.grid import Layout, ParallelGrid
from megatron_prune.model.tensors import DTYPES
from megatron_prune.sources.source import CastSource, Source
from megatron_prune.stages.common import FORMATS, LegacyNames, Saves
from megatron_prune.stages.publishing import Publishing
from megatron_prune.store.hf import DEFAULT_SHARD_BYTES
from megatron_prune.surgery import Target

_SIZES = {"GIB": 2**30, "MIB": 2**20, "GB": 10**9, "MB": 10**6, "KB": 10**3}


@dataclass(frozen=True, kw_only=True)
class Targeted(Publishing, LegacyNames, Layout, Saves):
    """Of a stage that writes a model in any format."""

    to: str = flag("target format", choices=("hf", "megatron"))
    ckpt_format: str = flag(
        "Megatron's formats: distributed or legacy", default=FORMATS[0], choices=FORMATS
    )
    dtype: str = flag("of the weights", default="keep", choices=("keep", *DTYPES))
    max_shard_size: str = flag(
        "of a safetensors file, such as 5GB or 500MB",
        default=f"{DEFAULT_SHARD_BYTES // 10**9}GB",
        metavar="SIZE",
    )

    @property
    def target(self) -> Target:
        """What is written.

        Raises:
            ConfigError: a layout for a Hugging Face directory, or a size that is none.
        """
        grid = self.grid
        if self.to == "hf" and grid != ParallelGrid():
            raise ConfigError(
                f"--to hf with {grid.tensor_parallel} x {grid.pipeline_parallel} parallel shards: "
                "a Hugging Face directory is not split by rank; leave the sizes out"
            )
        return Target(
            directory=self.save,
            format="hf" if self.to == "hf" else self.ckpt_format,
            grid=grid,
            max_shard_bytes=parse_bytes(self.max_shard_size),
            base_model=self.base_model,
            te_norms=self.te_norms,
        )

    def cast(self, source: Source) -> Source:
        """The source in the dtype of ``--dtype``."""
        return source if self.dtype == "keep" else CastSource(source, self.dtype)


def parse_bytes(text: str) -> int:
    """``5GB`` -> 5 * 10**9, as transformers counts.

    Raises:
        ConfigError: not a size.
    """
    word = text.strip().upper()
    for suffix, factor in _SIZES.items():
        if word.endswith(suffix) and word.removesuffix(suffix).strip().isdigit():
            return int(word.removesuffix(suffix)) * factor
    raise ConfigError(f"--max-shard-size {text!r}: wanted a size such as 5GB or 500MB")
