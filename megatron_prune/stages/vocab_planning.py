"""Decide which tokens of a tokenizer stay, and write it down.

  megatron-prune vocab plan --tokenizer llama --counts counts.npz --vocab-size-remain 16384 \\
      --save vocab_plan.json

Special tokens, single bytes and characters always stay, and with a token everything that it is
merged from: a piece of text whose tokens all stay encodes as before. Of the others `leaf` (the
default) takes away, from the outside, the least frequent; `leaf-fertility` those that cost the
fewest more tokens; `closure` keeps the most frequent with their parts; `prefix` keeps those that
were learned first and needs no --counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune.errors import ConfigError
from megatron_prune.flags import flag, flag_name, given, positive
from megatron_prune.model.grid import VOCAB_DIVISOR
from megatron_prune.stages.common import check_output_file
from megatron_prune.stages.console import SILENT, Console
from megatron_prune.stages.vocabulary import tell_tokens_beyond

if TYPE_CHECKING:
    from emb_pruner.formats import Vocabulary
    from emb_pruner.reading import Input
    from emb_pruner.vocab_plan import VocabPlan


@dataclass(frozen=True, kw_only=True)
class VocabPlanOptions:
    tokenizer: Path = flag("directory or file", metavar="PATH")
    counts: Path | None = flag("of `vocab count`", default=None, metavar="NPZ")
    vocab_size_remain: int | None = flag(
        "tokens to keep, special ones too", default=None, metavar="K", parse=positive
    )
    method: str | None = flag(
        "how to choose (default: leaf; without --counts prefix)",
        default=None,
        choices=("leaf", "leaf-fertility", "closure", "prefix"),
    )
    prior: float | None = flag(
        "how much the order of learning counts beside --counts (default: 1, as much)",
        default=None,
        metavar="SHARE",
    )
    keep_file: Path | None = flag(
        "tokens that stay in any case, one a line", default=None, metavar="TXT"
    )
    keep_ids: Path | None = flag(
        "keep the ids of a remain_vocab_ids.pt, in place of --vocab-size-remain",
        default=None,
        metavar="PT",
    )
    close: bool = flag("add what has to stay with --keep-ids, too", default=False)
    save_ids: Path | None = flag(
        "the kept ids as a remain_vocab_ids.pt, too", default=None, metavar="PT"
    )
    balance_for: int = flag(
        f"K has to be a multiple of {VOCAB_DIVISOR} times this: no padding",
        default=1,
        metavar="TP",
        parse=positive,
    )
    any_size: bool = flag("take K as it is, pad when sharded", default=False)
    held_out: tuple[Path, ...] = flag(
        "text to judge on, or JSON lines by the name .jsonl (.gz and .zst too)",
        default=(),
        metavar="FILE",
    )
    json_key: str = flag("that holds the text of JSON lines", default="text", metavar="KEY")
    save: Path = flag("the plan", metavar="JSON")
    overwrite: bool = flag("replace a plan that is there", default=False)
    json: bool = flag("print the report as JSON", default=False)


@dataclass(frozen=True, kw_only=True)
class VocabPlanned:
    """A plan that was written; ``report`` has plain JSON values."""

    plan: VocabPlan
    report: dict[str, Any]
    as_json: bool

    def __str__(self) -> str:
        return json.dumps(self.report, indent=1) if self.as_json else _table(self.report)


def vocab_plan(options: VocabPlanOptions, console: Console = SILENT) -> VocabPlanned:
    """Decide, judge on ``held_out``, write the plan.

    Raises:
        ConfigError: options that do not go together, or files that cannot be used.
        PlanError: tokens that have to stay and would not.
    """
    from emb_pruner.formats import open_vocabulary
    from emb_pruner.reading import check_texts
    from emb_pruner.remain_ids import write_ids
    from megatron_prune.files import replace_file

    _check_choice(options)
    files = (options.counts, options.keep_file, options.keep_ids)
    inputs = [path for path in files if path is not None]
    for path in inputs:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
    held_out = check_texts(options.held_out, "--held-out")
    inputs += [options.tokenizer, *options.held_out]
    check_output_file(options.save, overwrite=options.overwrite, inputs=inputs)
    if options.save_ids is not None:
        check_output_file(
            options.save_ids,
            overwrite=options.overwrite,
            inputs=[*inputs, options.save],
            flag="--save-ids",
        )
    vocabulary = open_vocabulary(options.tokenizer)
    beyond = tell_tokens_beyond(vocabulary, options.tokenizer, console)
    if options.vocab_size_remain is not None:  # of tokens with a row
        options = replace(options, vocab_size_remain=options.vocab_size_remain + beyond)
    plan = _plan(vocabulary, options)
    report = _report(vocabulary, plan, held_out, options.json_key)
    if options.save_ids is not None:
        write_ids(options.save_ids, plan.kept)
    replace_file(options.save, plan.to_json().encode())
    console.say(f"wrote {options.save}")
    return VocabPlanned(plan=plan, report=report, as_json=options.json)


def _check_choice(options: VocabPlanOptions) -> None:
    if options.keep_ids is None:
        if options.close:
            raise ConfigError("--close belongs to --keep-ids; other plans are closed by themselves")
        if options.vocab_size_remain is None:
            raise ConfigError("--vocab-size-remain K is missing: how many tokens to keep")
        return
    for name in given(options):
        if name in ("vocab_size_remain", "counts", "method", "prior", "keep_file"):
            raise ConfigError(f"--keep-ids says which tokens stay; leave out {flag_name(name)}")


def _plan(vocabulary: Vocabulary, options: VocabPlanOptions) -> VocabPlan:
    from emb_pruner.planning import make_vocab_plan, plan_of_ids

    if options.keep_ids is None:
        assert options.vocab_size_remain is not None
        _check_size(options.vocab_size_remain, vocabulary, options, "--vocab-size-remain")
        return make_vocab_plan(
            vocabulary,
            options.vocab_size_remain,
            counts=options.counts,
            method=options.method,
            prior=options.prior,
            keep_file=options.keep_file,
            balance_for=options.balance_for,
        )
    plan = plan_of_ids(
        vocabulary, options.keep_ids, close=options.close, balance_for=options.balance_for
    )
    _check_size(plan.size, vocabulary, options, str(options.keep_ids))
    return plan


def _check_size(size: int, vocabulary: Vocabulary, options: VocabPlanOptions, what: str) -> None:
    """``what`` asks for that size.

    Raises:
        ConfigError: a size that would have to be padded, with the nearest ones.
    """
    step = VOCAB_DIVISOR * options.balance_for
    if options.any_size or size % step == 0:
        return
    below, most = size // step * step, vocabulary.forest.size
    nearest = " or ".join(f"{n}" for n in (below, below + step) if 0 < n <= most)
    raise ConfigError(
        f"{what} {size}: not a multiple of {step} ({VOCAB_DIVISOR} x --balance-for "
        f"{options.balance_for}), so shards would be padded; wanted "
        f"{f'{nearest}, or --any-size' if nearest else '--any-size'}"
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
        for one in held_out:
            texts = read_texts(one, cutter, json_key)
            found = judge(vocabulary, pruned, plan, texts)
            if not found.units:
                raise ConfigError(f"--held-out {one.path}: no text in it")
            judged[str(one.path)] = found
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
