"""What holds for every stage: flags, recipes, help, and what goes to which stream."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prune.cli import STAGES, VOCAB, stage_parser
from megatron_prune.errors import ConfigError
from tests.pico import directory_bytes, ok, refused, run

Models, Shards, Plans = Callable[[str], Path], Callable[..., Path], Callable[[str], Path]


FILE_STAGES = ("convert", "inspect", "plan", "prune", "report", "reshard", "verify", "vocab prune")


@pytest.mark.parametrize(
    "stage", sorted({*STAGES, *(f"vocab {action}" for action in VOCAB)} - {"vocab"})
)
def test_help_of_every_stage_explains_it(stage: str) -> None:
    text = ok(*stage.split(), "--help").out
    usage, about, *_ = text.split("\n\n")
    assert usage.startswith(f"usage: megatron-prune {stage}")
    assert about.strip().endswith(".") and len(about) > 40
    assert "--config RECIPE" in text and "--debug" in text


@pytest.mark.parametrize("stage", FILE_STAGES)
def test_every_flag_has_a_help_and_every_stage_an_example(stage: str) -> None:
    parser, *_ = stage_parser(stage)
    assert [action.option_strings for action in parser._actions if not action.help] == []
    assert f"megatron-prune {stage} " in str(parser.description)


def test_help_lists_every_stage_in_the_order_of_the_walk() -> None:
    text = ok("--help").out
    places = [text.index(f"\n  {stage} ") for stage in STAGES]
    assert places == sorted(places)


def test_help_of_vocab_lists_its_actions() -> None:
    text = ok("vocab", "--help").out
    places = [text.index(f"\n  {action} ") for action in VOCAB]
    assert places == sorted(places)


def test_an_unknown_stage_or_flag_is_a_usage_error() -> None:
    wrong = (["slice"], [], ["inspect"], ["inspect", "x", "--frobnicate"], ["vocab"])
    for argv in (*wrong, ["vocab", "slice"]):
        done = run(*argv)
        assert done.code == 2 and "usage: megatron-prune" in done.err


def test_flags_are_never_abbreviated(models: Models, tmp_path: Path) -> None:
    """`--tensor 3` would mean another flag as soon as a second one begins with it."""
    done = run("convert", "--load", models("gqa"), "--sav", tmp_path / "x", "--to", "hf")
    assert done.code == 2 and not (tmp_path / "x").exists()


def test_dashes_and_underscores_are_the_same(models: Models, tmp_path: Path) -> None:
    dashes = ("--hidden-size-remain", 36, "--drop-layers", "1", "--balance-for=3")
    underscores = ("--hidden_size_remain", 36, "--drop_layers", "1", "--balance_for=3")
    for name, flags in (("a", dashes), ("b", underscores)):
        ok("plan", "--load", models("gqa"), "--save", tmp_path / name, *flags)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_an_empty_word_is_no_path(
    path: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--load "$UNSET"` is not the directory that the command runs in."""
    monkeypatch.chdir(models("gqa"))
    for argv in (("inspect", path), ("plan", "--load", path, "--save", tmp_path / "plan.json")):
        done = run(*argv)
        assert done.code == 2 and "wanted a path" in done.err


def test_underscores_in_values_stay(models: Models, tmp_path: Path) -> None:
    ok("plan", "--load", models("gqa"), f"--save={tmp_path}/my_plan_1.json")
    assert (tmp_path / "my_plan_1.json").exists()


FLAT = "hidden-size-remain: 36\nffn_hidden_size_remain: 60\ndrop-layers: [1, 2]\nseed: 5\n"
PER_STAGE = "convert:\n  to: hf\nplan:\n" + "".join(f"  {x}\n" for x in FLAT.splitlines())


@pytest.mark.parametrize("recipe", [FLAT, PER_STAGE, FLAT + "overwrite: false\ncriterion: null\n"])
def test_a_recipe_is_the_flags_written_down(recipe: str, models: Models, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe)
    load = ("--load", models("gqa"))
    ok("plan", *load, "--save", tmp_path / "a", "--config", tmp_path / "r.yaml")
    flags = ("--hidden-size-remain", 36, "--ffn-hidden-size-remain", 60, "--drop-layers", "1,2")
    ok("plan", *load, "--save", tmp_path / "b", *flags, "--seed", 5)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_command_line_wins_over_the_recipe(models: Models, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(FLAT)
    for config in (("--config", tmp_path / "r.yaml"), (f"--config={tmp_path / 'r.yaml'}",)):
        save = ("--save", tmp_path / "a", "--overwrite")
        ok("plan", "--seed", 6, "--load", models("gqa"), *save, *config)
        assert json.loads((tmp_path / "a").read_text())["seed"] == 6


def test_true_in_a_recipe_is_a_switch_and_an_empty_list_is_left_out(
    models: Models, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text("dry-run: true\ndrop-layers: []\n")
    save = ("--save", tmp_path / "p.json")
    ok("plan", "--load", models("gqa"), *save, "--config", tmp_path / "r.yaml")
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (None, "No such file"),
        ("- a\n- b\n", "wanted a table of flags, found list"),
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.system ['touch canary']", "not YAML"),
        ("seed: {a: 1}", "seed is a table; wanted a number, a string or a list"),
        (b"\xff\xfe\x00", "not YAML"),
    ],
)
def test_a_recipe_that_is_none_is_refused(
    recipe: str | bytes | None,
    says: str,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "r.yaml"
    if recipe is not None:
        file.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    message = refused("plan", "--load", models("gqa"), "--save", "p", "--config", file, says=says)
    assert f"--config {file}" in message or str(file) in message
    assert not (tmp_path / "canary").exists()


def test_an_unknown_flag_in_a_recipe_is_a_usage_error(models: Models, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("hiden-size-remain: 36\n")
    save = ("--save", tmp_path / "p.json")
    done = run("plan", "--load", models("gqa"), *save, "--config", tmp_path / "r.yaml")
    assert done.code == 2 and "--hiden-size-remain=36" in done.err


def test_dry_run_writes_nothing_and_says_what_it_would(
    models: Models, shards: Shards, plans: Plans, tmp_path: Path
) -> None:
    save, gqa = ("--save", tmp_path / "out", "--dry-run"), ("--load", models("gqa"))
    for stage in (
        ("convert", *gqa, *save, "--to", "megatron", "--tensor-model-parallel-size", 3),
        ("prune", *gqa, *save, "--to", "hf", "--plan", plans("gqa")),
        ("reshard", "--load", shards("gqa"), *save),
    ):
        assert "would write" in ok(*stage).out
    assert "num_layers" in ok("plan", *gqa, *save, "--drop-layers", 1).out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_what_the_run_would(models: Models, tmp_path: Path) -> None:
    save = ("--save", tmp_path / "out", "--dry-run", "--to", "megatron")
    wrong = ("--tensor-model-parallel-size", 4)
    refused("convert", "--load", models("gqa"), *save, *wrong, says="legal for this shape: 1, 3")


def test_results_go_to_standard_output_and_the_rest_to_standard_error(
    models: Models, tmp_path: Path
) -> None:
    done = ok("convert", "--load", models("gqa"), "--save", tmp_path / "out", "--to", "hf")
    assert done.out.startswith(f"wrote {tmp_path / 'out'}: hf") and done.out.count("\n") == 1
    assert "convert: 100%" in done.err
    done = run("convert", "--load", models("gqa"), "--save", tmp_path / "out", "--to", "hf")
    assert done.out == "" and done.err.startswith("megatron-prune: error: --save")
    assert "Traceback" not in done.err


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "none", "--debug")
    assert done.code == 2 and "Traceback" in done.err and "CheckpointError" in done.err


def test_errors_of_the_storage_exit_4_and_others_2(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_prune.stages import inspection

    def broken(error: Exception) -> Callable[..., None]:
        def fail(*_: object) -> None:
            raise error

        return fail

    for error, code in (
        (OSError(28, "No space left on device"), 4),
        (PermissionError(13, "Permission denied"), 4),
        (FileNotFoundError(2, "No such file or directory"), 2),
        (ConfigError("wrong"), 2),
        (KeyboardInterrupt(), 130),
    ):
        monkeypatch.setattr(inspection, "inspect", broken(error))
        assert run("inspect", "x").code == code


def test_a_reader_that_leaves_ends_the_command_quietly(models: Models) -> None:
    """`megatron-prune inspect X | head`, from a directory that is not the checkout (F26)."""
    command = f"{sys.executable} -m megatron_prune inspect {models('gqa')}"
    script = f"{command} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == "141" and done.stderr == ""


def test_the_entry_points_work_from_any_directory(models: Models, tmp_path: Path) -> None:
    """The installed command and `python -m`; a result and nothing else on standard output."""
    before = directory_bytes(models("gqa"))
    for command in (
        [Path(sys.executable).parent / "megatron-prune"],
        [sys.executable, "-m", "megatron_prune"],
    ):
        argv = [*command, "inspect", models("gqa"), "--json"]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["format"] == "hf"
    assert list(tmp_path.iterdir()) == [] and directory_bytes(models("gqa")) == before


@pytest.mark.parametrize("stage", ["evaluate", "generate", "score", "train", "inspect"])
def test_every_stage_says_what_it_leaves_in_one_line(
    stage: str, models: Models, tmp_path: Path
) -> None:
    """Also where it is then refused, as here for want of a text."""
    path = Path(shutil.copytree(models("gqa"), tmp_path / "m"))
    (path / "optimizer.pt").write_bytes(b"x")
    (path / "tokenizer.json").unlink()
    more = {
        "evaluate": ("--data", tmp_path / "none"),
        "generate": ("--prompt", "a", "--max-new-tokens", 1),
        "score": ("--save", tmp_path / "s", "--criterion", "magnitude"),
        "train": (
            *("--save", tmp_path / "t", "--data-path", tmp_path / "none", "--lr", 1, "--dry-run"),
            *("--micro-batch-size", 1, "--seq-length", 16, "--train-iters", 1),
        ),
        "inspect": (),
    }[stage]
    done = run(stage, *(() if stage == "inspect" else ("--load",)), path, *more)
    told = [line for line in done.err.splitlines() if "left out" in line]
    assert [line.startswith("megatron-prune: warning: ") for line in told] == [True], done.err
    assert "UserWarning" not in done.err
