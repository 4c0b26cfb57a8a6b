"""Checks that run on several ranks: one launch of four processes works through a list of them.

`launch` starts the processes; each takes part in the jobs whose world it belongs to, and leaves
what it found in a file.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.launch import fork_ranks, free_groups, free_port, wait

HERE = Path(__file__).resolve()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A check and what it is given; ``world`` is the number of ranks that run it."""

    check: str
    world: int
    given: dict[str, Any] = field(default_factory=dict)


def launch(jobs: list[Job], folder: Path, ranks: int = 4) -> list[list[Any]]:
    """Run the jobs; the results of each, one a rank. An error is a string that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = [
        {"check": job.check, "world": job.world, "given": job.given, "port": free_port()}
        for job in jobs
    ]
    (folder / "jobs.json").write_text(json.dumps(listed))
    words, said = [(rank, folder) for rank in range(ranks)], folder / "said.txt"
    wait(fork_ranks({"file": str(HERE)}, words, [(said, said)] * ranks))
    return [
        [_result(folder / f"{number}_{rank}.pt", folder) for rank in range(job.world)]
        for number, job in enumerate(jobs)
    ]


def _result(path: Path, folder: Path) -> Any:
    if path.exists():
        return torch.load(path)
    return f"no result {path.name}: {(folder / 'said.txt').read_text()[-2000:]}"


# ---- on the ranks --------------------------------------------------------------------------------


def _grid(layout: dict[str, int]) -> Any:
    from megatron_prune.model.grid import ParallelGrid

    return ParallelGrid(**layout)


def _forward(model: Any, ids: Tensor, groups: Any) -> list[Tensor]:
    """The last stage's output for a batch, through the pipeline schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(_: Any, model: Any) -> tuple[Tensor, Any]:
        return model(ids, None, None), lambda logits, non_loss_data: logits

    found: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward, data_iterator=None, model=model, num_microbatches=1,
        seq_length=ids.shape[1], micro_batch_size=len(ids), forward_only=True,
        collect_non_loss_data=True,
    )  # fmt: skip
    return found


def logits(load: str, ids: str, layout: dict[str, int], **options: Any) -> Tensor | None:
    """Logits over the padded vocabulary, whole; None on ranks without them."""
    from megatron_prune.engine.forward.model import ModelOptions, build_model
    from megatron_prune.engine.forward.weights import load_weights
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.store import open_source

    tokens = torch.load(ids)
    with model_parallel(_grid(layout), timeout_minutes=1) as groups, torch.no_grad():
        source = open_source(Path(load))
        options = {"seq_length": tokens.shape[1], **options}
        model = build_model(source.config, groups, ModelOptions(**options)).eval()
        load_weights(model, source, groups)
        found = _forward(model, tokens, groups)
        if not found:
            return None
        parts = [torch.empty_like(found[0]) for _ in range(groups.grid.tensor_parallel)]
        torch.distributed.all_gather(parts, found[0].contiguous(), group=groups.tp_group)
        return torch.cat(parts, dim=-1)


def gradients(
    load: str, wanted: str, ids: str, layout: dict[str, int], **options: Any
) -> dict[str, Any]:
    """One backward pass: the loss's share, the norm, and how far each gradient is from ``wanted``.

    ``wanted`` is a Hugging Face directory with transformers' gradients in place of the weights.
    """
    from megatron_prune.engine.forward import weights
    from megatron_prune.engine.forward.loss import real_columns
    from megatron_prune.engine.forward.microbatches import (
        Microbatch,
        Step,
        forward_backward,
        lm_loss,
    )
    from megatron_prune.engine.forward.model import build_model
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.engine.train import inputs as run_inputs
    from megatron_prune.engine.train.optimizer import build_optimizer, wrap_model
    from megatron_prune.engine.train.options import TrainOptions
    from megatron_prune.model import axes
    from megatron_prune.model.blocks import EMBEDDING, OUTPUT
    from megatron_prune.store import open_source

    tokens = torch.load(ids)
    with model_parallel(_grid(layout), timeout_minutes=1) as groups:
        source, reference = open_source(Path(load)), open_source(Path(wanted))
        given = TrainOptions(
            load=None, save=Path("nowhere"), data_path=(), train_iters=1, micro_batch_size=1,
            seq_length=tokens.shape[1] - 1, lr=0.0, **options,
        )  # fmt: skip
        model = build_model(source.config, groups, run_inputs.model_options(given))
        weights.load_weights(model, source, groups)
        ddp = wrap_model(model, given)
        optimizer = build_optimizer(ddp, given)
        ddp.zero_grad_buffer()
        mine = tokens[groups.dp_rank :: groups.data_parallel]
        mask = torch.ones(1, tokens.shape[1] - 1)
        data = (Microbatch(row[None, :-1], row[None, 1:], mask, mask.sum()) for row in mine)
        step = Step(iteration=1, count=len(mine), rows=1, length=given.seq_length)
        (share,) = forward_backward(
            ddp, data, step, groups, lm_loss, ["lm loss"], forward_only=False
        )
        first = groups.grid.stage_layers(source.config.shape.num_layers, groups.pp_rank).start
        far: dict[str, float] = {}
        for name, parameter in model.named_parameters():
            if given.use_distributed_optimizer:
                break  # each rank holds a part of the sum only
            layer, rest = axes.split_layer(name)
            whole = name if layer is None else axes.layer_name(first + layer, rest)
            rows = len(parameter)
            expected = weights._local_parameter(whole, rows, source.config, groups, reference.read)
            expected = expected.clone()
            if rest in (EMBEDDING.name, OUTPUT.name):  # padding learns nothing
                real = real_columns(source.config.shape.vocab_size, rows, groups.tp_rank)
                expected[real:] = 0
            far[whole] = float((parameter.main_grad - expected).abs().max())
        _, norm, _ = optimizer.step()
        return {"share": share, "norm": float(norm), "far": far}


def command(words: list[str], **by_rank: str) -> int:
    """A command line, on every rank; its exit code. ``by_rank`` adds words on one rank only."""
    from megatron_prune.cli import main

    return main([*words, *by_rank.get(f"rank{os.environ['RANK']}", "").split()])


def divergence(**given: Any) -> dict[str, float]:
    """How far the distillation loss on this rank's shard is from plain torch's on the whole."""
    from tests.engine.divergences import errors

    return errors(**given)


def poisoned(words: list[str], at: dict[str, str], rank: int = 0) -> int:
    """``command`` with iteration -> what goes wrong in it, on one rank."""
    from tests.engine.wrong_steps import wrong_steps

    with wrong_steps({int(n): what for n, what in at.items()}, rank):
        return command(words)


def copied(run: str, to: str) -> int:
    """A run's directory, to go on with."""
    shutil.copytree(run, to)
    return 0


CHECKS = {
    "copied": copied,
    "divergence": divergence,
    "poisoned": poisoned,
    "logits": logits,
    "gradients": gradients,
    "command": command,
}


def _work(rank: int, folder: Path) -> None:
    before: list[Path] = []
    for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        # a rank with nothing to do must not wait for the others at a rendezvous that times out
        while not all(path.exists() for path in before):
            time.sleep(0.02)
        before = [folder / f"{number}_{other}.pt" for other in range(job["world"])]
        if rank >= job["world"]:
            continue
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]),
        )  # fmt: skip
        try:
            found = CHECKS[job["check"]](**job["given"])
        except Exception:
            found = f"rank {rank}, {job}: {traceback.format_exc()}"
        free_groups()
        torch.save(found, folder / f"{number}_{rank}.pt.part")
        os.rename(folder / f"{number}_{rank}.pt.part", folder / f"{number}_{rank}.pt")


if __name__ == "__main__":
    _work(int(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # taking a whole interpreter apart takes as long as some checks
