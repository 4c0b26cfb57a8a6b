"""Decide which tokens of a tokenizer stay, and write it down.

Special tokens, single bytes and characters always stay, and with a token everything that it is
merged from: a piece of text whose tokens all stay encodes as before. Of the others `leaf` (the
default) takes away, from the outside, the least frequent; `leaf-fertility` those that cost the
fewest more tokens; `closure` keeps the most frequent with their parts; `prefix` keeps those that
were learned first and needs no --counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune.cli.options import check_output_file, positive
from megatron_prune.errors import ConfigError
from megatron_prune.model.grid import VOCAB_DIVISOR

if TYPE_CHECKING:
    from emb_pruner.formats import Vocabulary
    from emb_pruner.reading import Input
    from emb_pruner.vocab_plan import VocabPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="PATH", help="directory or file"
    )
    parser.add_argument("--counts", type=Path, metavar="NPZ", help="of `vocab count`")
    parser.add_argument(
        "--vocab-size-remain", type=positive, metavar="K", help="tokens to keep, special ones too"
    )
    parser.add_argument(
        "--method",
        choices=("leaf", "leaf-fertility", "closure", "prefix"),
        help="default: leaf; without --counts prefix",
    )
    parser.add_argument(
        "--prior",
        type=float,
        metavar="SHARE",
        help="how much the order of learning counts beside --counts (default 1: as much)",
    )
    parser.add_argument(
        "--keep-file", type=Path, metavar="TXT", help="tokens that stay in any case, one a line"
    )
    parser.add_argument(
        "--keep-ids",
        type=Path,
        metavar="PT",
        help="keep the ids of a remain_vocab_ids.pt, in place of --vocab-size-remain",
    )
    parser.add_argument(
        "--close", action="store_true", help="add what has to stay with --keep-ids, too"
    )
    parser.add_argument(
        "--save-ids", type=Path, metavar="PT", help="the kept ids as a remain_vocab_ids.pt, too"
    )
    parser.add_argument(
        "--balance-for",
        type=positive,
        default=1,
        metavar="TP",
        help=f"K has to be a multiple of {VOCAB_DIVISOR} times this: no padding (default 1)",
    )
    parser.add_argument("--any-size", action="store_true", help="take K as it is, pad when sharded")
    parser.add_argument(
        "--held-out",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text to judge on, or JSON lines by the name .jsonl (.gz and .zst too)",
    )
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="that holds the text of JSON lines (default: text)",
    )
    parser.add_argument("--save", type=Path, required=True, metavar="JSON", help="the plan")
    parser.add_argument("--overwrite", action="store_true", help="replace a plan that is there")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> None:
    from emb_pruner.formats import open_vocabulary
    from emb_pruner.reading import check_texts
    from emb_pruner.remain_ids import write_ids
    from megatron_prune.files import replace_file

    _check_choice(args)
    given = (args.counts, args.keep_file, args.keep_ids)
    inputs = [path for path in given if path is not None]
    for path in inputs:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
    held_out = check_texts(args.held_out, "--held-out")
    inputs += args.held_out
    check_output_file(args.save, overwrite=args.overwrite, inputs=(args.tokenizer, *inputs))
    if args.save_ids is not None:
        check_output_file(
            args.save_ids,
            overwrite=args.overwrite,
            inputs=(args.tokenizer, *inputs, args.save),
            flag="--save-ids",
        )
    vocabulary = open_vocabulary(args.tokenizer)
    plan = _plan(vocabulary, args)
    report = _report(vocabulary, plan, held_out, args.json_key)
    if args.save_ids is not None:
        write_ids(args.save_ids, plan.kept)
    replace_file(args.save, plan.to_json().encode())
    print(json.dumps(report, indent=1) if args.json else _table(report))
    print(f"wrote {args.save}", file=sys.stderr)


def _check_choice(args: argparse.Namespace) -> None:
    if args.keep_ids is None:
        if args.close:
            raise ConfigError("--close belongs to --keep-ids; other plans are closed by themselves")
        if args.vocab_size_remain is None:
            raise ConfigError("--vocab-size-remain K is missing: how many tokens to keep")
        check_size(args.vocab_size_remain, args.balance_for, any_size=args.any_size)
        return
    for name in ("vocab_size_remain", "counts", "method", "prior", "keep_file"):
        if getattr(args, name) is not None:
            raise ConfigError(
                f"--keep-ids says which tokens stay; leave out --{name.replace('_', '-')}"
            )


def _plan(vocabulary: Vocabulary, args: argparse.Namespace) -> VocabPlan:
    from emb_pruner.planning import make_vocab_plan, plan_of_ids

    if args.keep_ids is None:
        return make_vocab_plan(
            vocabulary,
            args.vocab_size_remain,
            counts=args.counts,
            method=args.method,
            prior=args.prior,
            keep_file=args.keep_file,
            balance_for=args.balance_for,
        )
    plan = plan_of_ids(vocabulary, args.keep_ids, close=args.close, balance_for=args.balance_for)
    check_size(plan.size, args.balance_for, any_size=args.any_size, what=str(args.keep_ids))
    return plan


def check_size(
    size: int, balance_for: int, *, any_size: bool, what: str = "--vocab-size-remain"
) -> None:
    """``what`` asks for that size.

    Raises:
        ConfigError: a size that would have to be padded, with the nearest ones.
    """
    step = VOCAB_DIVISOR * balance_for
    if any_size or size % step == 0:
        return
    below = size // step * step
    nearest = f"{below} or {below + step}" if below else str(step)
    raise ConfigError(
        f"{what} {size}: not a multiple of {step} ({VOCAB_DIVISOR} x --balance-for "
        f"{balance_for}), so shards would be padded; wanted {nearest}, or --any-size"
    )


def _report(
    vocabulary: Vocabulary, plan: VocabPlan, held_out: list[Input], json_key: str
) -> dict[str, Any]:
    import tempfile

    from emb_pruner.cutting import cutter_for
    from emb_pruner.formats import open_vocabulary
    from emb_pruner.judging import dead_tokens, judge
    from emb_pruner.reading import read_texts

    cutter, judged = cutter_for(vocabulary), {}

    with tempfile.TemporaryDirectory(prefix="vocab-plan-") as folder:
        vocabulary.write(plan, Path(folder))
        pruned = open_vocabulary(vocabulary.written(Path(folder)))
        dead = dead_tokens(vocabulary, pruned, plan)
        for given in held_out:
            texts = read_texts(given, cutter, json_key)
            found = judge(vocabulary, pruned, plan, texts)
            if not found.units:
                raise ConfigError(f"--held-out {given.path}: no text in it")
            judged[str(given.path)] = found
    return {
        "tokenizer": str(vocabulary.path),
        "kind": vocabulary.kind,
        "tokens": plan.source_size,
        "kept": plan.size,
        "method": plan.method,
        "reasons": dict(plan.reasons),
        "dead": [vocabulary.token(token) for token in dead],
        "held_out": {
            path: {
                "bytes": one.bytes,
                "tokens_before": one.tokens_before,
                "tokens_after": one.tokens_after,
                "fertility": one.fertility,
                "identical_units": one.identical / max(one.units, 1),
                "changed_though_kept": one.changed,
            }
            for path, one in judged.items()
        },
    }


def _table(report: dict[str, Any]) -> str:
    dropped = report["tokens"] - report["kept"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in report["reasons"].items())
    lines = [
        f"{report['kind']}: {report['kept']} of {report['tokens']} tokens stay, "
        f"chosen by {report['method']}",
        f"of these {reasons}",
        f"dead tokens {len(report['dead'])}"
        + (f": {' '.join(map(repr, report['dead'][:8]))}" if report["dead"] else ""),
        "rows saved, embedding and untied output layer each, in bf16: "
        + ", ".join(f"{dropped * d * 2 / 1e6:.0f} MB at hidden {d}" for d in (576, 2048, 4096)),
    ]
    for path, one in report["held_out"].items():
        lines.append(
            f"{path}: {one['fertility']:.4f} tokens for each one before "
            f"({one['bytes'] / max(one['tokens_before'], 1):.3f} -> "
            f"{one['bytes'] / max(one['tokens_after'], 1):.3f} bytes a token), "
            f"{one['identical_units']:.2%} of units as before, "
            f"{one['changed_though_kept']} changed though their tokens stay"
        )
    return "\n".join(lines)
