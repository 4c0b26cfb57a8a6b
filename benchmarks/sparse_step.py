"""What the prune step of `sparsify` costs by itself: CPU seconds, one thread, no forward pass.

  python benchmarks/sparse_step.py
  python benchmarks/sparse_step.py --model runs/models/SmolLM2-135M-Instruct \\
      --only '50% wanda' '50% sparsegpt'

The linears of a layer are pruned as `sparsify` does it, those that share an input together: what a
method prepares of the second moments, and the rows. Second moments themselves are part of the
forward pass and not counted. The baseline is `plain_sparsity.py`, the authors' procedure, matrix by
matrix; it runs right after ours on the same layer, so both meet the same machine. Every repeat is
another layer; seconds are the median times the number of layers, ratios medians of pairs. "Alike"
is the share of places that both keep or both prune; in N:M the baseline leaves it to ``topk`` which
of equal weights go.

Then rows are dealt out over processes joined by gloo, as the engine does: the first prepares and
gives it to all, thresholds are agreed on. Shown are each rank's CPU seconds as a share of those it
needs for the whole layer by itself, while the others do the same, so that caches and cores are
shared in either case.

With ``--model`` shapes and weights are the checkpoint's, else those of ``--shape`` and random; what
enters a layer is random in either case, inputs of unlike size that hang together. How many
steps ALPS takes depends on both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from plain_sparsity import PROCEDURES
from torch import Tensor

from megatron_prune.families.llama import LLAMA
from megatron_prune.model.axes import layer_name, tensor_shape
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.solve.kselect import ALONE, Dealt
from megatron_prune.sources.source import Source
from megatron_prune.sparsity.method import Asked, How, Inputs, Pattern, Prepared, method_for
from megatron_prune.store import open_source

ZEROS = {
    "50%": Asked(share=0.5),
    "2:4": Asked(share=0.5, pattern=Pattern(keep=2, group=4)),
}
HOW = {
    "magnitude": ("magnitude", How()),
    "wanda": ("wanda", How()),
    "wanda, variant": ("wanda", How(variant=True)),
    "sparsegpt": ("sparsegpt", How()),
    "magnitude, seq": ("magnitude", How(weight_update="seq")),
    "magnitude, iter": ("magnitude", How(weight_update="iter")),
    "wanda, seq": ("wanda", How(weight_update="seq")),
    "wanda, iter": ("wanda", How(weight_update="iter")),
    "wanda, refit": ("wanda", How(refit=True)),
    "sparsegpt, refit": ("sparsegpt", How(refit=True)),
    "admm": ("admm", How()),
    "alps": ("alps", How()),
}
SHAPES = {
    "SmolLM2-135M": ModelShape(
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        kv_channels=64,
        vocab_size=49152,
    ),
    "Llama-3.2-1B": ModelShape(
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=64,
        vocab_size=128256,
    ),
}
WINDOWS, TOKENS = 16, 256  # of the random inputs


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Matrices that share an input, whole, and what enters them."""

    weights: list[Tensor]
    inputs: Inputs


def layer_of(config: ModelConfig, source: Source | None, number: int) -> list[Shared]:
    """A layer's linears, in the order of the forward pass; the same for the same number."""
    torch.manual_seed(number)
    found = []
    for half in config.family.halves:
        for modules in (half.inputs, (half.output,)):
            names = [layer_name(number, f"{module}.weight") for module in modules]
            weights = [
                0.05 * torch.randn(tensor_shape(name, config.shape))
                if source is None
                else source.read(name).float()
                for name in names
            ]
            found.append(Shared(weights=weights, inputs=random_inputs(weights[0].shape[1])))
    return found


def random_inputs(size: int) -> Inputs:
    """Inputs that hang together and whose sizes spread over two orders of magnitude."""
    mixing = torch.eye(size) + torch.randn(size, size) / size**0.5
    x_TI = torch.randn(WINDOWS * TOKENS, size) @ mixing * torch.randn(size).exp()
    squares_I = x_TI.square().sum(0, dtype=torch.float64) / WINDOWS
    return Inputs(windows=WINDOWS, squares_I=squares_I, gram_II=x_TI.T @ x_TI)


def prune(
    name: str,
    asked: Asked,
    layer: Sequence[Shared],
    dealt: Dealt = ALONE,
    prepare: Callable[[Callable[[], Prepared]], Prepared] = lambda make: make(),
) -> list[Tensor]:
    """All matrices of a layer by a method of the package; this rank's rows of each."""
    method_name, how = HOW[name]
    method = method_for(method_name, how)
    done = []
    for shared in layer:
        prepared: Prepared = {}
        if method.needs != "weights":
            inputs = shared.inputs
            prepared = prepare(lambda inputs=inputs: method.prepare(inputs, how))
        rows = [
            w[len(w) * dealt.rank // dealt.ranks : len(w) * (dealt.rank + 1) // dealt.ranks]
            for w in shared.weights
        ]
        done += [each.weight_RI for each in method.prune(rows, prepared, asked, how, dealt)]
    return done


def prune_plainly(name: str, asked: Asked, layer: Sequence[Shared]) -> list[Tensor]:
    """The same by the plain procedure."""
    return [PROCEDURES[name](w, each.inputs, asked) for each in layer for w in each.weights]


def cpu_seconds(work: Callable[..., list[Tensor]], *args: Any) -> tuple[float, list[Tensor]]:
    began = time.process_time()
    found = work(*args)
    return time.process_time() - began, found


def agreement(ours: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """Of all places, those where both are zero or neither."""
    alike = sum(int(((a == 0) == (b == 0)).sum()) for a, b in zip(ours, plain))
    return alike / sum(x.numel() for x in ours)


def rows_of_table(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for zeros in ZEROS:
        for name in HOW:
            is_defined = not (HOW[name][1].variant and ZEROS[zeros].pattern)
            if is_defined and any(fnmatch(f"{zeros} {name}", only) for only in args.only):
                yield zeros, name


def layers(args: argparse.Namespace) -> tuple[int, list[list[Shared]]]:
    """How many there are, and those that are measured."""
    source = None if args.model is None else open_source(args.model)
    shape = SHAPES[args.shape]
    config = ModelConfig(family=LLAMA, shape=shape, tied=True, dtype="fp32", hf_config={})
    config = config if source is None else source.config
    count = config.shape.num_layers
    chosen = [i * count // args.repeats for i in range(args.repeats)]
    return count, [layer_of(config, source, number) for number in chosen]


def against_plain(args: argparse.Namespace) -> None:
    count, measured = layers(args)
    prune("magnitude", ZEROS["50%"], measured[0])  # imports, and the first call of everything
    print("| zeros | method | authors' procedure (s) | here (s) | ratio | alike |")
    print("|---|---|---|---|---|---|")
    for zeros, name in rows_of_table(args):
        ours, plain, alike = [], [], []
        for layer in measured:
            seconds, found = cpu_seconds(prune, name, ZEROS[zeros], layer)
            ours.append(seconds)
            seconds, wanted = cpu_seconds(prune_plainly, name, ZEROS[zeros], layer)
            plain.append(seconds)
            alike.append(agreement(found, wanted))
        ratio = statistics.median(a / b for a, b in zip(ours, plain))
        print(
            f"| {zeros} | {name} | {count * statistics.median(plain):.1f} "
            f"| {count * statistics.median(ours):.1f} | {ratio:.2f} | {min(alike):.4%} |",
            flush=True,
        )


def over_ranks(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        mp.spawn(_rank, (args, Path(folder)), args.ranks)
        found = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(args.ranks)]
    ranks = " | ".join(f"rank {rank}" for rank in range(args.ranks))
    print(f"\n| zeros | method | prepare alone | {ranks} | all ranks |")
    print("|---|---|---|" + "---|" * (args.ranks + 1))
    for i, (zeros, name) in enumerate(rows_of_table(args)):
        shares = [_share(each["dealt"][i], each["alone"][i]) for each in found]
        prepare = _share(found[0]["prepare"][i], found[0]["alone"][i])
        cells = " | ".join(f"{share:.2f}" for share in shares)
        print(f"| {zeros} | {name} | {prepare:.2f} | {cells} | {sum(shares):.2f} |")


def _share(part: list[float], whole: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(part, whole))


def _rank(rank: int, args: argparse.Namespace, folder: Path) -> None:
    """CPU seconds of every row and layer: of the whole layer, and of the rows that are dealt."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=args.ranks,
        timeout=timedelta(hours=2),
    )
    dealt = Dealt(rank=rank, ranks=args.ranks, total=_total)
    _, measured = layers(args)
    prune("magnitude", ZEROS["50%"], measured[0], dealt)
    seconds: dict[str, list[list[float]]] = {"alone": [], "prepare": [], "dealt": []}
    for zeros, name in rows_of_table(args):
        asked, row = ZEROS[zeros], {"alone": [], "prepare": [], "dealt": []}
        for layer in measured:
            clock = _Clock()
            row["alone"].append(cpu_seconds(prune, name, asked, layer, ALONE, clock)[0])
            row["prepare"].append(clock.seconds)
            dist.barrier()
            row["dealt"].append(cpu_seconds(prune, name, asked, layer, dealt, _given)[0])
            dist.barrier()
        for kind, values in row.items():
            seconds[kind].append(values)
    (folder / f"{rank}.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


class _Clock:
    """Prepares, and adds up what that takes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, make: Callable[[], Prepared]) -> Prepared:
        began = time.process_time()
        made = make()
        self.seconds += time.process_time() - began
        return made


def _given(make: Callable[[], Prepared]) -> Prepared:
    """What the first rank prepares, for all."""
    first = dist.get_rank() == 0
    made = dict(make()) if first else {}
    facts = [[(name, x.shape, x.dtype) for name, x in made.items()]]
    dist.broadcast_object_list(facts, 0)
    for name, shape, dtype in facts[0]:
        made[name] = made[name].contiguous() if first else torch.empty(shape, dtype=dtype)
        dist.broadcast(made[name], 0)
    return made


def _total(x: Tensor) -> Tensor:
    summed = x.clone()
    dist.all_reduce(summed)
    return summed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint")
    parser.add_argument("--shape", choices=SHAPES, default="SmolLM2-135M", help="without --model")
    parser.add_argument("--only", nargs="*", default=["*"], help="rows: '2:4 alps' or '50% *'")
    parser.add_argument("--repeats", type=int, default=3, help="layers that are measured")
    parser.add_argument("--ranks", type=int, default=2, help="processes; 1 leaves that table out")
    parser.add_argument("--skip-plain", action="store_true", help="only the table of ranks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.skip_plain:
        against_plain(args)
    if args.ranks > 1:
        over_ranks(args)


if __name__ == "__main__":
    main()
