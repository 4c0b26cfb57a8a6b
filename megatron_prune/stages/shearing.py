"""Learn what to prune: gates trained with the weights towards a target shape (Sheared LLaMA).

  megatron-prune shear --load llama --save runs/sheared --hidden-size-remain 2560 \\
      --num-attention-heads-remain 20 --ffn-hidden-size-remain 6912 --num-layers-remain 30 \\
      --domains domains.yaml --train-iters 3200 --sparsity-warmup-iters 640 --lr 1e-4 \\
      --micro-batch-size 4 --global-batch-size 32 --seq-length 4096 --save-pruned llama-pruned
  torchrun --nproc-per-node 8 -m megatron_prune shear ... --tensor-model-parallel-size 8
  megatron-prune shear --save runs/sheared --save-pruned llama-pruned

The command takes the flags of `train` besides, and a --save that holds a run continues it. At the
end SAVE has plan.json and mask_scores.safetensors (for `plan --scores` and `report`) beside the
checkpoints; --save-pruned writes the pruned model with its gates folded in, as a Hugging Face
directory. It may be given alone, for a run that has ended or was stopped. Layers are Megatron's
local ones: Transformer Engine fuses norms and has no place for gates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_prune.engine.groups import model_parallel, world_size
from megatron_prune.engine.train.checks import check_options
from megatron_prune.engine.train.shear_options import ShearOptions
from megatron_prune.errors import CheckpointError, ConfigError
from megatron_prune.files import replace_file
from megatron_prune.flags import given_flags
from megatron_prune.model.shape import ModelConfig
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.planning.scores import scores_bytes
from megatron_prune.ranks import Ranks, is_first_rank
from megatron_prune.shearing.folding import Gates
from megatron_prune.shearing.words import MASK_SCORES, MASKS
from megatron_prune.sources.folded import FoldedSource
from megatron_prune.sources.folding_record import Folding
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.source import Source
from megatron_prune.stages.common import Saves
from megatron_prune.stages.console import SILENT, Console
from megatron_prune.stages.deciding import plan_table, warn_not_loadable
from megatron_prune.stages.writing import Written, write
from megatron_prune.store import open_source
from megatron_prune.store.commit import check_target
from megatron_prune.store.passenger import PLAN
from megatron_prune.surgery import Target

if TYPE_CHECKING:
    from megatron_prune.engine.objectives.shear_decision import Decision
    from megatron_prune.engine.shearing import Ended
    from megatron_prune.shearing.masks import Masks

_NEAR = 0.01  # of the target; what is farther is told
_SAME = 1e-3  # relative, of the loss of the gated and of the pruned model


@dataclass(frozen=True, kw_only=True)
class Sheared:
    """What a run has come to.

    Attributes:
        losses: validation losses in nats by what was measured; empty without validation.
    """

    plan: PrunePlan
    source: ModelConfig
    losses: dict[str, float]
    written: Written | None

    def __str__(self) -> str:
        lines = [plan_table(self.source, self.plan)]
        lines += [f"validation loss of {what}: {loss:.6f}" for what, loss in self.losses.items()]
        return "\n".join(lines + ([] if self.written is None else [str(self.written)]))


def shear(options: ShearOptions, console: Console = SILENT) -> Sheared | str | None:
    """Train masks and weights, decide by the masks, and write what was asked for.

    Returns:
        With ``dry_run`` what would happen; None when the run has not come to its end.

    Raises:
        PruneError: whatever cannot be used, before the first weight is read.
        Interrupted: after a signal, everything saved.
    """
    if options.save_pruned is not None:
        _check_pruned(options)
    if options.writes_only:
        return _finish(options, console)
    options.check_masks()
    # weights alone are taken from --load; what lies in --save goes on
    options = replace(options, transformer_impl="local", finetune=True)
    grid, contexts, processes = options.grid, options.context_parallel_size, world_size()
    if options.dry_run and processes == 1:
        processes = grid.world_size * contexts
    check_options(options, grid, processes)
    from megatron_prune.engine.shearing import check_run, learn

    told = check_run(options)
    if options.dry_run:
        from megatron_prune.engine.train.dry_run import describe

        plan = describe(options, grid, processes, freezes=options.freeze_weights)
        return f"{plan}\n{told}"
    with model_parallel(
        grid,
        context_parallel=contexts,
        seed=options.seed,
        timeout_minutes=options.distributed_timeout_minutes,
    ) as groups:
        ended = learn(options, groups, options.command)
        if not ended.is_done:
            return None
        return _finish(options, console, ended, groups.ranks)


def _check_pruned(options: ShearOptions) -> None:
    """Refuse an output before hours of work."""
    assert options.save_pruned is not None
    check_target(options.save_pruned, overwrite=False, flag="--save-pruned")
    if not options.writes_only:
        return
    if more := sorted({*given_flags(options)} - {"--save", "--save-pruned"}):
        raise ConfigError(
            f"{more[0]} without --load and --train-iters: nothing is trained, and --save-pruned "
            "takes all else from the run in --save"
        )


def _finish(
    options: ShearOptions,
    console: Console,
    ended: Ended | None = None,
    ranks: Ranks | None = None,
) -> Sheared:
    """Plan, scores and pruned model of the newest checkpoint in ``--save``."""
    from megatron_prune.engine.objectives.shear_decision import Decision
    from megatron_prune.engine.train.checkpoint import (
        Start,
        newest_checkpoint,
        taking_up,
        training_state,
    )
    from megatron_prune.shearing.masks import Masks

    newest = newest_checkpoint(options.save, mend=False)
    state = None if newest is None else training_state(newest)
    if newest is None or state is None or MASKS not in state:
        raise CheckpointError(
            f"--save {options.save}: has no checkpoint of a run of `shear`; train one there first"
        )
    source = open_source(newest)
    try:
        with taking_up(Start(directory=newest, state=state)):
            decision = Decision.of_facts(state[MASKS], source.config)
            masks = Masks.at_rest(decision.method, decision.axes, state[MASKS])
            plan = decision.plan(masks)
        iteration = int(state["iteration"])
        is_done = iteration == decision.steps
        if is_done and is_first_rank():
            settings = {"iteration": iteration, "method": decision.method}
            found = scores_bytes(decision.scores(masks, settings))
            replace_file(options.save / MASK_SCORES, found)
            replace_file(options.save / PLAN, plan.to_json().encode())
        if not is_done:
            console.say(
                f"warning: {newest}: the run was stopped after {iteration} of {decision.steps} "
                "steps; the plan is made of the masks as they are"
            )
        warn_not_loadable(source.config, plan, console)
        losses = {} if ended is None else _told(ended, console)
        written = None
        if options.save_pruned is not None:
            pruned, cut, record = _pruned(decision, masks, source, iteration)
            written = _write(options, pruned, cut, record, ranks, console)
            if ended is not None and ended.measure is not None:
                losses["the pruned model"] = ended.measure(options.save_pruned)
                _compare(losses, console)
        return Sheared(plan=plan, source=source.config, losses=losses, written=written)
    finally:
        source.close()


def _told(ended: Ended, console: Console) -> dict[str, float]:
    """The losses by name; how far from its target what is held has stayed is a warning."""
    for word, (found, wanted) in ended.distances.items():
        if abs(found - wanted) > _NEAR:
            console.say(
                f"warning: {word}: the masks expect {found:.4f} of it to go, the target is "
                f"{wanted:.4f}; the plan is exact all the same, but cuts what was not yet learned "
                "to go. Train longer, or raise --lagrangian-lr"
            )
    named = {"all soft gates": ended.losses.soft, "the gates of the plan": ended.losses.final}
    return {what: loss for what, loss in named.items() if loss is not None}


def _compare(losses: dict[str, float], console: Console) -> None:
    gated, pruned = losses["the gates of the plan"], losses["the pruned model"]
    if abs(pruned / gated - 1) > _SAME:
        console.say(
            f"warning: the model with the gates of the plan has a loss of {gated:.6f}, the pruned "
            f"one {pruned:.6f}; wanted the same but for rounding"
        )


def _pruned(
    decision: Decision, masks: Masks, source: Source, iteration: int
) -> tuple[Source, PrunePlan, Folding]:
    """The trained model as the gates leave it, its plan, and the record of what was folded."""
    plan = decision.plan(masks, source.digest)
    cut = PrunedSource(source, plan)
    gates = Gates(shape=cut.config.shape, by_axis=decision.folded(masks, plan))
    record = Folding(
        plan_digest=plan.digest,
        source_digest=source.digest,
        settings={"method": decision.method, "iteration": iteration, "steps": decision.steps},
        gates=gates,
    )
    return FoldedSource(cut, gates), plan, record


def _write(
    options: ShearOptions,
    pruned: Source,
    plan: PrunePlan,
    record: Folding,
    ranks: Ranks | None,
    console: Console,
) -> Written:
    assert options.save_pruned is not None
    target = Target(directory=options.save_pruned, format="hf")
    saves = Saves(load=options.save, save=options.save_pruned)
    return write("shear", saves, pruned, target, console, plan, ranks=ranks, folding=record)
