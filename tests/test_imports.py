"""Imports go one way, and most commands need neither Megatron nor transformers."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import megatron_prune

PACKAGE = Path(megatron_prune.__file__).parent
ROOTS = (PACKAGE.name, "emb_pruner", "tools")
# An import goes only to an earlier line; parts of one line never import each other. A part is a
# file or a folder of the package; `engine` is taken apart, since it is as large as all the rest.
# `emb_pruner` is a part, but for the predecessor's commands in it, which call our command line.
LAYERS = (
    ("__init__", "errors", "flags"),
    ("ranks", "files"),
    ("model", "solve"),
    ("families",),
    ("planning", "shearing"),
    ("sources", "data"),
    ("criteria", "sparsity"),
    ("store",),
    ("surgery", "verify", "emb_pruner"),
    ("verify_sparse",),
    ("engine.cpu", "engine.failures", "engine.running"),
    ("engine.groups",),
    ("engine.forward",),
    ("engine.observe", "engine.profile"),
    ("engine.repair", "engine.sparsify", "engine.objectives"),
    ("engine.train",),
    ("engine.shearing",),
    ("evaluate", "report"),
    ("stages",),
    ("cli",),
    ("__main__", "emb_pruner.doors"),
    ("emb_pruner.llama_emb_pruner", "emb_pruner.qwen_emb_pruner", "tools"),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}


def _imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Every module a file imports, at its top or inside a function, as its dotted parts."""
    package = path.relative_to(PACKAGE.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split("."))
            if module[0] in ROOTS and len(module) == 1:
                yield from ((*module, alias.name) for alias in node.names)
            else:
                yield module


def _part(module: tuple[str, ...]) -> str:
    """The part that a module, or a name in one, belongs to."""
    own = module[1:] if module[0] == PACKAGE.name else module
    for depth in (2, 1):
        if (part := ".".join(own[:depth])) in LAYER_OF:
            return part
    return "__init__"


def _module(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE.parent).with_suffix("").parts


def _files() -> list[Path]:
    return sorted(path for root in ROOTS for path in (PACKAGE.parent / root).rglob("*.py"))


def test_every_part_of_the_package_has_a_layer() -> None:
    for path in _files():
        module = _module(path)
        assert _part(module) != "__init__" or module[-1] == "__init__", path


def test_imports_go_only_to_an_earlier_layer() -> None:
    wrong = []
    for path in _files():
        mine = _part(_module(path))
        for module in _imports(path):
            if module[0] not in ROOTS or len(module) == 1:
                continue
            theirs = _part(module)
            is_upward = theirs != mine and LAYER_OF[theirs] >= LAYER_OF[mine]
            if is_upward:
                wrong.append(f"{path.relative_to(PACKAGE.parent)} imports {'.'.join(module)}")
    assert wrong == []


def test_only_the_engine_imports_megatron() -> None:
    users = {_module(f)[1] for f in _files() if any(m[0] == "megatron" for m in _imports(f))}
    assert users <= {"engine"}


def test_nothing_imports_the_distributed_checkpoint_reader() -> None:
    """torch's DCP executes pickles; only its writer and the plain records of an index are used."""
    banned = ("load", "state_dict_loader", "default_planner", "FileSystemReader")
    for path in _files():
        for module in _imports(path):
            assert not (
                module[:3] == ("torch", "distributed", "checkpoint") and module[-1] in banned
            )


def test_file_commands_load_neither_megatron_nor_transformers(models, tmp_path: Path) -> None:
    """In a fresh process: inspect, convert, plan, prune and verify."""
    script = """
import json, sys
from megatron_prune.cli import main
for argv in json.loads(sys.argv[1]):
    assert main(argv) == 0, argv
heavy = {"megatron", "transformers", "transformer_engine", "matplotlib", "tensorboard", "nltk"}
found = heavy & {name.split(".")[0] for name in sys.modules}
found |= {"torch.distributed.checkpoint"} & {*sys.modules}
print(sorted(found), file=sys.stderr)
"""
    source, plan = str(models("gqa")), str(tmp_path / "p.json")
    out = [str(tmp_path / name) for name in "abcd"]
    stages = [
        ["inspect", source],
        ["convert", "--load", source, "--save", out[0], "--to", "megatron"],
        ["convert", "--load", out[0], "--save", out[1], "--to", "hf"],
        ["reshard", "--load", out[0], "--save", out[2], "--ckpt-format", "torch"],
        ["plan", "--load", source, "--save", plan, "--ffn-hidden-size-remain", "60"],
        ["prune", "--load", out[2], "--save", out[3], "--to", "hf", "--plan", plan],
        ["verify", "--load", out[3], "--source", source, "--plan", plan],
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(stages)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_help_and_refused_flags_load_neither_torch_nor_numpy() -> None:
    """In a fresh process: their import costs ten times as much as all the rest."""
    script = """
import contextlib, io, json, sys
from megatron_prune.cli import STAGES, VOCAB, main
pairs = [[stage] for stage in STAGES if stage != "vocab"] + [["vocab", action] for action in VOCAB]
with contextlib.redirect_stdout(io.StringIO()):
    for argv in [*([*words, "--help"] for words in pairs), *json.loads(sys.argv[1])]:
        try:
            code = main(argv)
        except SystemExit as exit:
            code = exit.code
        assert code == (0 if "--help" in argv else 2), (argv, code)
print(sorted({"torch", "numpy"} & {name.split(".")[0] for name in sys.modules}), file=sys.stderr)
"""
    model = ["--load", "model", "--save", "out"]
    run = ["--data-path", "corpus", "--seq-length", "8", "--micro-batch-size", "1", "--lr", "1e-3"]
    refused = [
        ["inspect"],
        ["convert", *model, "--to", "hf", "--tensor-model-parallel-size", "2"],
        ["convert", *model, "--to", "hf", "--push-to-hub", "no/such/name"],
        ["prune", *model, "--to", "hf", "--repair"],
        ["prune", *model, "--to", "hf", "--ffn-hidden-size-remain", "many"],
        ["sparsify", *model, "--to", "hf"],
        ["sparsify", *model, "--to", "hf", "--method", "wanda", "--sparsity", "0.5"],
        ["sparsify", *model, "--to", "hf", "--pattern", "4:4"],
        ["sparsify", *model, "--to", "hf", "--method", "magnitude", "--sparsity", "0.5"],
        ["plan", *model, "--drop-layers", "a"],
        ["plan", *model, "--rounds", "0"],
        ["score", *model, "--criterion", "nothing"],
        ["train", *model, *run, "--train-iters", "0"],
        ["train", *model, *run, "--train-iters", "2", "--min-lr", "1"],
        ["evaluate", "--load", "model"],
        ["generate", "--load", "model", "--prompt", "a", "--temperature", "-1"],
        ["preprocess", "--input", "a", "--tokenizer-model", "b"],
        ["vocab", "plan", "--tokenizer", "a", "--counts", "b", "--save", "c"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(refused)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "[]"
