"""What stock megatron.core reads and writes, on two ranks; started by test_megatron.py.

    python megatron_ranks.py FOLDER

FOLDER/jobs.json lists the jobs; each leaves its files in FOLDER. Megatron's writer starts processes
that import this file again, hence the guard at the end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.engine.forward.model import ModelOptions, build_model
from megatron_prune.engine.groups import Groups, model_parallel
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.store import open_source
from megatron_prune.store.megatron_args import megatron_args
from tests.pico import IDS


def empty_model(source: str, groups: Groups) -> Any:
    """Megatron's GPTModel of a model's shape, every parameter NaN."""
    model = build_model(open_source(Path(source)).config, groups, ModelOptions(seq_length=48))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model.eval()


def load_dist(model: Any, directory: str) -> None:
    """As stock Megatron-LM does, and every key is met: one is there for Transformer Engine only."""
    from megatron.core import dist_checkpointing

    state, unread, absent = dist_checkpointing.load(
        {"model": model.sharded_state_dict()}, directory, strict="return_all"
    )
    assert absent == set(), absent
    assert unread == {"decoder.layers.self_attention.core_attention._extra_state"}, unread
    model.load_state_dict(state["model"], strict=True)


def load_legacy(model: Any, directory: str, groups: Groups) -> None:
    stage = f"_{groups.pp_rank:03d}" if groups.grid.pipeline_parallel > 1 else ""
    file = Path(directory) / f"mp_rank_{groups.tp_rank:02d}{stage}" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)  # as stock does; the file is our own
    assert state["checkpoint_version"] == 3.0 and state["iteration"] == 1
    assert state["args"].tensor_model_parallel_size == groups.grid.tensor_parallel
    model.load_state_dict(state["model"], strict=True)


def logits(model: Any, groups: Groups) -> Tensor | None:
    """The whole model's logits over the padded vocabulary, on the last stage."""
    positions = torch.arange(IDS.shape[1])[None]
    with torch.no_grad():
        if not groups.is_first_stage:
            hidden = torch.empty(IDS.shape[1], 1, model.config.hidden_size)
            dist.recv(hidden, groups.ranks.rank - groups.grid.tensor_parallel)
            model.set_input_tensor(hidden)
        out = model(IDS, positions, None)
        if not groups.is_last_stage:
            dist.send(out.contiguous(), groups.ranks.rank + groups.grid.tensor_parallel)
            return None
        parts = [torch.empty_like(out) for _ in range(groups.grid.tensor_parallel)]
        dist.all_gather(parts, out.contiguous(), group=groups.tp_group)
    return torch.cat(parts, -1)


def save_dist(model: Any, source: str, groups: Groups, root: Path, stacked: bool) -> None:
    """As stock Megatron-LM does, an optimizer's state beside the model."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    config, grid, directory = open_source(Path(source)).config, groups.grid, root / "iter_0000007"
    if groups.ranks.is_first:
        directory.mkdir(parents=True)
    dist.barrier()
    moment = ShardedTensor.from_rank_offsets(
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight",
        torch.zeros(4), (0, groups.ranks.rank, groups.ranks.world_size),
    )  # fmt: skip
    state = {
        "args": megatron_args(config, grid, iteration=7),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": model.sharded_state_dict(metadata={"non_homogeneous_layers": not stacked}),
        "optimizer": {"moment": moment},
    }
    dist_checkpointing.save(state, str(directory))
    dist.barrier()
    if groups.ranks.is_first:
        (root / "latest_checkpointed_iteration.txt").write_text("7")


def save_legacy(model: Any, source: str, groups: Groups, root: Path) -> None:
    stage = f"_{groups.pp_rank:03d}" if groups.grid.pipeline_parallel > 1 else ""
    directory = root / "iter_0000007" / f"mp_rank_{groups.tp_rank:02d}{stage}"
    directory.mkdir(parents=True)
    state = {
        "args": megatron_args(open_source(Path(source)).config, groups.grid, iteration=7),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": model.state_dict_for_save_checkpoint(),
        "optimizer": {"param_groups": [], "state": {0: {"step": torch.zeros(1)}}},
    }
    torch.save(state, directory / "model_optim_rng.pt")
    if groups.ranks.is_first:
        (root / "latest_checkpointed_iteration.txt").write_text("7")


def run(job: dict[str, Any], folder: Path) -> None:
    os.environ["MASTER_PORT"] = str(job["port"])
    grid = ParallelGrid(**job["grid"])
    with model_parallel(grid) as groups:
        for name, directory in job["load"].items():
            model = empty_model(job["source"], groups)
            if name.startswith("dist"):
                load_dist(model, directory)
            else:
                load_legacy(model, directory, groups)
            found = logits(model, groups)
            if found is not None and groups.tp_rank == 0:
                torch.save(found, folder / f"{job['name']}-{name}.pt")
        for name in job["save"]:
            root = folder / f"{job['name']}-{name}"
            if name == "legacy":
                save_legacy(model, job["source"], groups, root)
            else:
                save_dist(model, job["source"], groups, root, stacked=name == "stacked")
        dist.barrier()


def main() -> None:
    folder = Path(sys.argv[1])
    for job in json.loads((folder / "jobs.json").read_text()):
        run(job, folder)


if __name__ == "__main__":
    main()
