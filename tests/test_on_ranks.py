"""Several processes: the same bytes as one, and refusals and failures that end all of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import launch
from tests.pico import TEXT, directory_bytes, ok

Models, Shards, Plans = Callable[[str], Path], Callable[..., Path], Callable[[str], Path]
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
PRUNE = ("--ffn-hidden-size-remain", 60, "--hidden-size-remain", 36, "--balance-for", 3)


def stages(gqa: Path, shards: Path, plan: Path, out: Path) -> list[tuple]:
    """Every kind of writing, with fewer and with more files than ranks."""
    megatron = ("--to", "megatron", TP, 3)
    return [
        ("convert", "--load", gqa, "--save", out / "dist", *megatron),
        ("convert", "--load", gqa, "--save", out / "torch", *megatron, "--ckpt-format", "torch"),
        ("convert", "--load", shards, "--save", out / "hf", "--to", "hf"),
        ("convert", "--load", gqa, "--save", out / "s", "--to", "hf", "--max-shard-size", "40KB"),
        ("prune", "--load", shards, "--save", out / "p", *megatron, PP, 3, "--plan", plan),
        ("prune", "--load", gqa, "--save", out / "flags", *megatron, *PRUNE),
        ("reshard", "--load", shards, "--save", out / "r", TP, 1, PP, 4),
    ]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_the_same_bytes_as_one_process(
    ranks: int, models: Models, shards: Shards, plans: Plans, tmp_path: Path
) -> None:
    """Whole directories with manifest and plan; the plan made on the way too (law 3)."""
    given = (models("gqa"), shards("gqa", "torch", 3, 1), plans("gqa"))
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    for stage in stages(*given, tmp_path / "one"):
        ok(*stage)
    many = stages(*given, tmp_path / "many")
    done = launch(ranks, *many)
    assert [rank.codes for rank in done] == [[0] * len(many)] * ranks, done[0].err + done[1].err
    assert directory_bytes(tmp_path / "one") == directory_bytes(tmp_path / "many")
    for rank in done[1:]:  # rank 0 speaks for all
        assert rank.out.startswith("codes ") and rank.err == ""
    assert done[0].out.count("wrote ") == len(many)


def test_torchrun_runs_the_package_from_any_directory(
    models: Models, shards: Shards, plans: Plans, tmp_path: Path
) -> None:
    save = ("--save", str(tmp_path / "p"), "--to", "megatron", TP, "3")
    argv = ["prune", "--load", str(shards("gqa")), "--plan", str(plans("gqa")), *save]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "megatron_prune", *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    ok("verify", "--load", tmp_path / "p", "--source", models("gqa"), "--plan", plans("gqa"))
    assert done.stdout.count("wrote ") == 1


def test_ranks_with_different_arguments_all_refuse(models: Models, tmp_path: Path) -> None:
    """F15: another seed, another target; noticed before the first byte is written."""
    save = ("--load", models("gqa"), "--save", tmp_path / "p", "--to", "hf", "--drop-layers", 1)
    done = launch(2, ("prune", *save, "--seed", 1), instead={1: ("prune", *save, "--seed", 2)})
    assert [rank.codes for rank in done] == [[2], [2]], done
    assert "--seed differs between ranks: rank 0 has 1, rank 1 has 2; start every" in done[0].err
    assert "Traceback" not in done[0].err + done[1].err
    assert list(tmp_path.iterdir()) == []


def test_ranks_with_different_plan_files_all_refuse(
    models: Models, plans: Plans, tmp_path: Path
) -> None:
    """One command line, but the relative path is another file on each machine."""
    for rank, seed in enumerate((1, 2)):
        (tmp_path / str(rank)).mkdir()
        plan = tmp_path / str(rank) / "plan.json"
        ok("plan", "--load", models("gqa"), "--save", plan, *PRUNE, "--seed", seed)
    stage = ("prune", "--load", models("gqa"), "--plan", "plan.json", "--to", "hf")
    prelude = f"os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])"
    done = launch(2, (*stage, "--save", tmp_path / "p"), prelude=prelude)
    assert [rank.codes for rank in done] == [[2], [2]], done
    assert "the plan differs between ranks" in done[0].err
    assert not (tmp_path / "p").exists()


def test_ranks_with_different_models_all_refuse(models: Models, tmp_path: Path) -> None:
    """One path again; of one shape and of another, which ended in a crash of gloo's."""
    for rank, kinds in enumerate((("gqa", "gqa"), ("twin", "mha"))):
        for name, kind in zip("ab", kinds):
            shutil.copytree(models(kind), tmp_path / str(rank) / name)
    text = tmp_path / "t.txt"
    text.write_text(TEXT * 9)
    size, corpus = ("--seq-length", 16), tmp_path / "c"
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": TEXT * 9}) + "\n")
    ok("preprocess", "--input", tmp_path / "t.jsonl", "--output-prefix", corpus,
       "--tokenizer-model", models("gqa"))  # fmt: skip
    out = tmp_path / "out"
    stages = [
        stage
        for name in "ab"
        for stage in (
            ("evaluate", "--load", name, "--data", text, *size),
            ("score", "--load", name, "--data", text, "--save", out, "--criterion", "wanda", *size,
             "--num-samples", 2),
            ("generate", "--load", name, "--prompt", "a", "--max-new-tokens", 1,
             "--tensor-model-parallel-size", 1),
            ("convert", "--load", name, "--save", out, "--to", "megatron"),
            ("profile", "--load", name, "--save", out, *size),
            ("train", "--load", name, "--save", out, "--data-path", f"{corpus}_text_document",
             "--train-iters", 1, "--micro-batch-size", 1, "--lr", 1, "--split", "1,0,0", *size),
        )
    ]  # fmt: skip
    prelude = f"os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])"
    done = launch(2, *stages, prelude=prelude)
    assert [rank.codes for rank in done] == [[2] * len(stages)] * 2, done
    assert done[0].err.count("differs between ranks: rank 1 of 2") == len(stages), done[0].err
    assert not out.exists() or list(out.glob("iter_*")) == []


FAIL = """
if os.environ["RANK"] == "1":
    from megatron_prune import files
    def write(self, data):
        {what}
    files.HashedFile.write = write
"""


@pytest.mark.parametrize(
    ("what", "codes", "says"),
    [
        ("raise OSError(28, 'No space left on device')", [[4], [4]], "rank 1 failed: OSError"),
        ("os.kill(os.getpid(), 9)", [[5], []], "another rank ended"),
    ],
    ids=["error", "kill"],
)
def test_what_happens_to_one_rank_ends_all_and_leaves_nothing(
    what: str, codes: list, says: str, models: Models, tmp_path: Path
) -> None:
    save = ("--save", tmp_path / "p", "--to", "megatron", TP, 3)
    stage = ("convert", "--load", models("gqa"), *save)
    done = launch(2, stage, prelude=FAIL.format(what=what))
    assert [rank.codes for rank in done] == codes, done
    assert says in done[0].err and "Traceback" not in done[0].err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_one_rank_refuses_is_refused_by_all(models: Models, tmp_path: Path) -> None:
    """Only rank 0 looks at the target once the others wait for it."""
    prelude = """
from megatron_prune.stages import conversion
conversion.check_save = lambda *args, **more: None
"""
    (tmp_path / "p").mkdir()
    (tmp_path / "p/mine").write_text("")
    stage = ("convert", "--load", models("gqa"), "--save", tmp_path / "p", "--to", "hf")
    done = launch(2, stage, prelude=prelude)
    assert [rank.codes for rank in done] == [[2], [2]], done
    assert "exists and is not empty" in done[0].err
    assert list(directory_bytes(tmp_path)) == ["p/mine"]
