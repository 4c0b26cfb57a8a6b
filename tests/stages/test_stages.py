"""Stages without a command line: the page that shows them, and the files they leave."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import megatron_prune
from megatron_prune import stages
from megatron_prune.cli import STAGES, VOCAB
from megatron_prune.errors import ConfigError
from megatron_prune.flags import FLAG
from tests.pico import TEXT, directory_bytes, ok

Models = Callable[[str], Path]
PAGE = Path(__file__).parents[2] / "docs/python.md"


def test_the_page_about_python_runs_as_it_is(models: Models, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "llama").symlink_to(models("gqa"))
    for name in ("calibration.txt", "held_out.txt"):
        (tmp_path / name).write_text(TEXT * 40)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "values as planned" in done.stdout
    losses = [float(loss) for loss in re.findall(r"^llama\S* ([0-9.]+)$", done.stdout, re.M)]
    assert len(losses) == 2 and losses[0] != losses[1]


def test_every_stage_is_a_function_with_options_that_are_flags() -> None:
    commands = {*STAGES, *(f"vocab {action}" for action in VOCAB)} - {"vocab"}
    assert len(stages.__all__) == 2 * len(commands)
    for command in commands:
        assert callable(getattr(stages, command.replace(" ", "_")))
        options = getattr(stages, f"{command.title().replace(' ', '')}Options")
        assert is_dataclass(options) and any(FLAG in one.metadata for one in fields(options))


def test_what_is_promised_is_there_and_importing_it_costs_nothing() -> None:
    assert all(getattr(megatron_prune, name) is not None for name in megatron_prune.__all__)
    script = "import sys, megatron_prune; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_stages_leave_the_files_that_the_commands_leave(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, called, typed = models("gqa"), tmp_path / "called", tmp_path / "typed"
    called.mkdir()
    typed.mkdir()
    stages.plan(stages.PlanOptions(load=model, save=called / "plan", hidden_size_remain=36))
    cut = stages.PruneOptions(load=model, plan=called / "plan", save=called / "cut", to="megatron")
    stages.prune(cut)
    stages.convert(stages.ConvertOptions(load=called / "cut", save=called / "hf", to="hf"))
    stages.reshard(
        stages.ReshardOptions(load=called / "cut", save=called / "legacy", ckpt_format="torch")
    )
    assert capsys.readouterr().out == ""
    ok("plan", "--load", model, "--save", typed / "plan", "--hidden-size-remain", 36)
    cut_as = ("--plan", typed / "plan", "--save", typed / "cut", "--to", "megatron")
    ok("prune", "--load", model, *cut_as)
    ok("convert", "--load", typed / "cut", "--save", typed / "hf", "--to", "hf")
    legacy = ("--save", typed / "legacy", "--ckpt-format", "torch")
    ok("reshard", "--load", typed / "cut", *legacy)
    assert directory_bytes(called) == directory_bytes(typed)


def test_a_stage_raises_what_the_command_says(models: Models, tmp_path: Path) -> None:
    options = stages.ConvertOptions(load=models("gqa"), save=tmp_path, to="hf", rotate=True)
    with pytest.raises(ConfigError, match="--rotate without --data"):
        stages.convert(options)
