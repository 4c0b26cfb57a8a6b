"""The reuse of finished steps, `scripts/_steps.sh`, driven as the walk drives it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
# `work` appends what it is told to its output, so that each run is seen.
PROLOGUE = """
set -euo pipefail
source scripts/_common.sh
source scripts/_steps.sh
work() { echo "$2" >>"$1"; [[ "$2" != fails ]] || return 75; }
"""


@pytest.fixture
def walk(tmp_path: Path):
    def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        import os

        return subprocess.run(
            ["bash", "-c", PROLOGUE + script, "walk"],
            cwd=REPO,
            env={"PATH": os.environ["PATH"], "RUN_DIR": str(tmp_path), **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def content(path: Path) -> list[str]:
    return path.read_text().split()


ONE = 'step one "$RUN_DIR/one" "" work "$RUN_DIR/one" {word}\n'
TWO = 'step two "$RUN_DIR/two" "one" work "$RUN_DIR/two" second\n'


def test_a_finished_step_is_not_run_again(walk, tmp_path: Path) -> None:
    for _ in range(2):
        done = walk(ONE.format(word="first"))
        assert done.returncode == 0, done.stderr
    assert content(tmp_path / "one") == ["first"]
    assert "one: done before" in done.stderr


def test_other_settings_stop_and_show_both(walk, tmp_path: Path) -> None:
    walk(ONE.format(word="first"))
    done = walk(ONE.format(word="other"))
    assert done.returncode == 2
    assert "was made with other settings" in done.stderr
    assert "first" in done.stderr
    assert "other" in done.stderr
    assert content(tmp_path / "one") == ["first"]


def test_redo_makes_it_and_what_comes_of_it_again(walk, tmp_path: Path) -> None:
    walk(ONE.format(word="first") + TWO)
    inode = (tmp_path / "two").stat().st_ino, (tmp_path / "two").stat().st_mtime_ns
    done = walk(ONE.format(word="other") + TWO, REDO="1")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "one") == ["other"]
    assert ((tmp_path / "two").stat().st_ino, (tmp_path / "two").stat().st_mtime_ns) != inode


def test_a_changed_input_is_noticed(walk, tmp_path: Path) -> None:
    source = tmp_path / "input"
    source.write_text("a")
    script = f'given input "{source}"\n' + TWO.replace('"one"', '"input"')
    assert walk(script).returncode == 0
    assert walk(script).returncode == 0
    source.write_text("another size")
    done = walk(script)
    assert done.returncode == 2
    assert "was made with other settings" in done.stderr


def test_an_unfinished_output_is_made_afresh(walk, tmp_path: Path) -> None:
    failed = walk('step one "$RUN_DIR/one" "" work "$RUN_DIR/one" fails')
    assert failed.returncode == 75  # the exit code of the command itself
    failed = walk('step one "$RUN_DIR/one" "" work "$RUN_DIR/one" fails')
    assert content(tmp_path / "one") == ["fails"]


def test_a_resumable_one_goes_on(walk, tmp_path: Path) -> None:
    for _ in range(2):
        walk('resumable_step one "$RUN_DIR/one" "" work "$RUN_DIR/one" fails')
    assert content(tmp_path / "one") == ["fails", "fails"]


def test_what_was_not_made_here_is_left_alone(walk, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("mine")
    done = walk(ONE.format(word="first"))
    assert done.returncode == 2
    assert "was not made here" in done.stderr
    assert content(tmp_path / "one") == ["mine"]


def test_a_command_without_its_output_is_an_error(walk) -> None:
    done = walk('step one "$RUN_DIR/one" "" true')
    assert done.returncode == 2
    assert "is not there" in done.stderr
