"""The flags of a shape from a budget, and the budgets they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_prune.errors import ConfigError, PlanError
from megatron_prune.flags import Group, flag, flag_name, given, positive
from megatron_prune.model.costs import (
    DTYPE_BYTES,
    flops_at,
    parameters_at,
    serving_bytes,
    sizes_of,
)
from megatron_prune.model.shape import ModelConfig
from megatron_prune.planning.latency import LatencyModel, fit_latency, load_latency_table
from megatron_prune.planning.search import PROPORTIONS, Budget
from megatron_prune.stages.common import check_not_input, check_output_file
from megatron_prune.stages.console import Console
from megatron_prune.stages.deciding import PlanFlags
from megatron_prune.stages.quantities import (
    parse_latency,
    parse_memory,
    parse_parameters,
    parse_weights,
)

SEARCH = Group("a shape from a budget")
_TARGETS = ("target_params", "target_memory", "target_latency")
_AT_SEQ, _AT_BATCH = 4096, 1  # of a budget, where no latency table says others


@dataclass(frozen=True, kw_only=True)
class SearchFlags(PlanFlags):
    """Of a stage that finds the shape that a budget allows, and writes a plan."""

    save: Path = flag("plan file", metavar="PLAN")
    overwrite: bool = flag("replace an existing plan", default=False)
    dry_run: bool = flag("print, write nothing", default=False)
    target_params: str | None = flag(
        "parameters at most: 3.4e9, 3.4B, 500M", default=None, metavar="N", group=SEARCH
    )
    target_memory: str | None = flag(
        "8GiB at most: weights, KV cache and activations, all ranks",
        default=None,
        metavar="SIZE",
        group=SEARCH,
    )
    target_latency: str | None = flag(
        "a forward in 20ms by --latency-table, or in 60%% of the source's (by its FLOPs without a "
        "table)",
        default=None,
        metavar="T",
        group=SEARCH,
    )
    latency_table: Path | None = flag(
        "of `megatron-prune profile`", default=None, metavar="JSON", group=SEARCH
    )
    at_seq: int | None = flag(
        f"tokens a sequence (default: {_AT_SEQ})",
        default=None,
        parse=positive,
        metavar="N",
        group=SEARCH,
    )
    at_batch: int | None = flag(
        f"sequences at once (default: {_AT_BATCH})",
        default=None,
        parse=positive,
        metavar="N",
        group=SEARCH,
    )
    at_dtype: str | None = flag(
        "of weights and cache (default: the model's)",
        default=None,
        choices=tuple(DTYPE_BYTES),
        group=SEARCH,
    )
    candidates: int = flag(
        "shapes to list and try", default=5, parse=positive, metavar="K", group=SEARCH
    )
    candidates_json: Path | None = flag(
        "they, and the front of cost against proxy", default=None, metavar="FILE", group=SEARCH
    )
    min_layers: int | None = flag(
        "fewest layers (default: half of the source's)",
        default=None,
        parse=positive,
        metavar="N",
        group=SEARCH,
    )
    multiple_of: int | None = flag(
        "of hidden and FFN (default: 64, less where an axis is shorter than 1024)",
        default=None,
        parse=positive,
        metavar="N",
        group=SEARCH,
    )
    proportions: float = flag(
        "FFN and attention against hidden at most this factor from the source's",
        default=PROPORTIONS,
        metavar="X",
        group=SEARCH,
    )
    proxy_weights: str | None = flag(
        "nats lost when an axis is halved, for the ranking, such as hidden=7,layers=3 (default: "
        "measured on --evaluate-data, else SmolLM2's)",
        default=None,
        metavar="W",
        group=SEARCH,
    )
    evaluate_data: Path | None = flag(
        "take the candidate with the least loss on it", default=None, metavar="TEXT", group=SEARCH
    )
    evaluate_seq_length: int = flag(
        "tokens a window", default=1024, parse=positive, metavar="N", group=SEARCH
    )
    max_windows: int = flag("of the text", default=16, parse=positive, metavar="N", group=SEARCH)
    repair_data: Path | None = flag(
        "repair each candidate on it before its loss is taken, as prune --repair --norm-rescale "
        "does",
        default=None,
        metavar="CALIB",
        group=SEARCH,
    )
    repair_samples: int = flag(
        "windows of CALIB", default=16, parse=positive, metavar="N", group=SEARCH
    )
    cache: Path | None = flag(
        "of losses: the same command goes on", default=None, metavar="DIR", group=SEARCH
    )
    drop_query_groups: bool = flag("let whole query groups go", default=False, group=SEARCH)

    def asks_for_search(self) -> bool:
        """Whether a budget is given.

        Raises:
            ConfigError: flags of the search, and no budget.
        """
        names = given(self, groups=(SEARCH,))
        searches = any(name in _TARGETS for name in names)
        if names and not searches:
            raise ConfigError(
                f"{flag_name(names[0])}: belongs to a search; say for what budget, with "
                "--target-params, --target-memory or --target-latency"
            )
        return searches

    def check_search(self) -> None:
        """Refuse what is malformed or missing, before the source is opened.

        Raises:
            ConfigError, PlanError: a flag that cannot be used.
        """
        if self.nonuniform:
            raise ConfigError(
                "--nonuniform with a budget: a search looks at equal layers; take the FFN size it "
                "finds as --ffn-hidden-size-remain"
            )
        for name, parse in (
            ("target_params", parse_parameters),
            ("target_memory", parse_memory),
            ("target_latency", parse_latency),
            ("proxy_weights", parse_weights),
        ):
            if getattr(self, name) is not None:
                parse(getattr(self, name))
        if self.latency_table is not None:
            load_latency_table(self.latency_table)
        elif self.target_latency is not None and not parse_latency(self.target_latency)[1]:
            raise ConfigError(
                f"--target-latency {self.target_latency}: a time needs --latency-table, measured "
                "on this machine by `megatron-prune profile`; without one give a share of the "
                "source's forward, such as 60%, which is counted in FLOPs"
            )
        self._check_outputs()
        if self.at_seq is not None and self.target_memory is None and self.target_latency is None:
            raise ConfigError("--at-seq: needs --target-memory or --target-latency")
        if self.at_batch is not None and self.target_memory is None and self.latency_table is None:
            raise ConfigError("--at-batch: needs --target-memory or --latency-table")
        asked = given(self, groups=(SEARCH,))
        for name in ("max_windows", "evaluate_seq_length", "repair_data", "cache"):
            if name in asked and self.evaluate_data is None:
                raise ConfigError(f"{flag_name(name)}: needs --evaluate-data TEXT")
        if "repair_samples" in asked and self.repair_data is None:
            raise ConfigError("--repair-samples: needs --repair-data CALIB")
        for name in ("evaluate_data", "repair_data"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ConfigError(f"{flag_name(name)} {path}: is not a file; wanted a text")
        if self.evaluate_data is not None:
            from megatron_prune.engine.groups import world_size

            if world_size() > 1:
                raise ConfigError(
                    f"--evaluate-data under torchrun with {world_size()} processes: candidates are "
                    "tried one after the other in one process; start plan without torchrun"
                )

    def _check_outputs(self) -> None:
        inputs = self.inputs
        if (path := self.candidates_json) is not None:
            flag = "--candidates-json"
            check_output_file(path, overwrite=self.overwrite, inputs=inputs, flag=flag)
            if path.resolve() == self.save.resolve():
                raise ConfigError(f"{flag} {path}: is --save, the plan's own file; choose another")
        if self.cache is not None:
            check_not_input("--cache", self.cache, inputs)

    @property
    def inputs(self) -> tuple[Path | None, ...]:
        """Everything that the command reads."""
        read = (self.load, self.scores, self.prune_config_path, self.latency_table)
        return (*read, self.evaluate_data, self.repair_data)


def latency_model(
    options: SearchFlags, config: ModelConfig, balance_for: int, console: Console
) -> LatencyModel | None:
    if options.latency_table is None:
        return None
    table = load_latency_table(options.latency_table)
    if table.kv_channels != config.shape.kv_channels:
        raise PlanError(
            f"--latency-table {options.latency_table}: measured with kv_channels "
            f"{table.kv_channels}, the model has {config.shape.kv_channels}; measure this model"
        )
    conditions = (
        ("--at-seq", options.at_seq, table.seq_length),
        ("--at-batch", options.at_batch, table.batch_size),
        ("--at-dtype", options.at_dtype, table.dtype),
        ("--balance-for", balance_for, table.tensor_parallel),
    )
    measured = (
        f"measured on {table.device} with {table.batch_size} x {table.seq_length} tokens in "
        f"{table.dtype} at TP {table.tensor_parallel}"
    )
    for name, wanted, found in conditions:
        if wanted is not None and wanted != found:
            raise PlanError(
                f"--latency-table {options.latency_table}: {measured}, asked for is {name} "
                f"{wanted}; measure again so, or give {name} {found}"
            )
    console.say(f"--latency-table {options.latency_table}: {measured}")
    return fit_latency(table)


def budgets(
    options: SearchFlags, config: ModelConfig, latency: LatencyModel | None, console: Console
) -> list[Budget]:
    """One for each ``--target-...``, in that order."""
    found = []
    dtype, seq_length = options.at_dtype or config.dtype, options.at_seq or _AT_SEQ
    if options.target_params is not None:
        found.append(
            Budget(
                name="parameters",
                flag="--target-params",
                limit=parse_parameters(options.target_params),
                cost=lambda sizes: parameters_at(config, sizes),
                unit="M parameters",
                scale=1e6,
            )
        )
    if options.target_memory is not None:
        found.append(
            Budget(
                name="bytes",
                flag="--target-memory",
                limit=parse_memory(options.target_memory),
                cost=lambda sizes: serving_bytes(
                    config,
                    sizes,
                    seq_length=seq_length,
                    batch_size=options.at_batch or _AT_BATCH,
                    dtype=dtype,
                ),
                unit="MiB",
                scale=2**20,
            )
        )
    if options.target_latency is not None:
        found.append(_latency_budget(options, config, latency, seq_length, console))
    return found


def _latency_budget(
    options: SearchFlags,
    config: ModelConfig,
    latency: LatencyModel | None,
    seq_length: int,
    console: Console,
) -> Budget:
    assert options.target_latency is not None
    value, is_share = parse_latency(options.target_latency)
    whole = sizes_of(config.shape)
    flag = "--target-latency"
    if latency is not None:
        limit = value * float(latency.seconds_at(whole)) if is_share else value
        return Budget(
            name="seconds", flag=flag, limit=limit, cost=latency.seconds_at, unit="ms", scale=1e-3
        )
    console.say(
        f"--target-latency {options.target_latency} without --latency-table: counted in FLOPs a "
        f"token at {seq_length} tokens of context; a smaller shape rarely gains as much time"
    )
    return Budget(
        name="flops_per_token",
        flag=flag,
        limit=value * float(flops_at(config, whole, seq_length)),
        cost=lambda sizes: flops_at(config, sizes, seq_length),
        unit="MFLOP/token",
        scale=1e6,
    )
