"""Flags of every stage with any value: a command succeeds or ends with 2, 3 or 4."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_prune.cli import STAGES, VOCAB, stage_parser
from tests.pico import make_model, run

NAMES = [name for name in STAGES if name != "vocab"] + [f"vocab {name}" for name in VOCAB]
VALUES = (
    *("", "-1", "0", "1", "2", "3", "1e9", "nan", "inf", "-inf", "9" * 30, "a,b", "1-3", "\u00e9"),
    *("../x", "hidden=random", "5GB", "/dev/null", "0.5", "[", "{}"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    make_model(folder / "m", "mqa")
    (folder / "t.txt").write_text("word " * 50)
    (folder / "bad.json").write_text("{}")
    return folder


@pytest.mark.parametrize("stage", NAMES)
def test_any_flags_end_in_a_message(stage: str, folder: Path) -> None:
    check(stage, folder, 6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", NAMES)
def test_any_flags_end_in_a_message_in_300_tries(stage: str, folder: Path) -> None:
    check(stage, folder, 300)


def check(stage: str, folder: Path, tries: int) -> None:
    actions = [a for a in stage_parser(stage)[0]._actions if a.option_strings and a.dest != "help"]
    required = {a.option_strings[0] for a in actions if a.required}
    paths = [str(folder / name) for name in ("m", "t.txt", "bad.json", "none", "")]
    value = st.sampled_from((*VALUES, *paths))

    @settings(max_examples=tries, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run_once(data: st.DataObject) -> None:
        words = stage.split()
        chosen = data.draw(st.sets(st.sampled_from([a.option_strings[0] for a in actions])))
        for action in actions:
            flag = action.option_strings[0]
            if flag not in chosen | required:
                continue
            words.append(flag)
            if action.nargs != 0:
                choices = list(map(str, action.choices)) if action.choices else None
                words.append(data.draw(st.sampled_from(choices) if choices else value))
        if "--dry-run" in {a.option_strings[0] for a in actions}:
            words.append("--dry-run")
        if "--save" in words:  # nothing but a place of its own is written
            words[words.index("--save") + 1] = str(folder / "out" / stage.replace(" ", "-"))
        assert run(*words).code in (0, 2, 3, 4), words

    run_once()
