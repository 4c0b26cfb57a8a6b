from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prune.data import sentences
from megatron_prune.data.sentences import load_splitter, train_splitter

NOUNS = [
    "ship",
    "crew",
    "harbour",
    "letter",
    "island",
    "captain",
    "storm",
    "night",
    "lamp",
    "rope",
    "sailor",
    "map",
]


def tell_story() -> str:
    """Plain sentences; "Capt." always has its dot, every other word mostly has none."""
    rng = random.Random(0)
    parts = []
    for _ in range(300):
        a, b, c = rng.sample(NOUNS, 3)
        parts.append(f"Capt. Smith saw the {a} near the {b}. He left the {c} and the {a}.")
    return " ".join(parts)


STORY = tell_story()
SCRIPT = """
import sys
from megatron_prune.data.sentences import train_splitter
text = open(sys.argv[1]).read()
print("|".join(train_splitter([text]).split(text[:4000])))
"""


def test_abbreviations_are_learned_from_the_corpus() -> None:
    text = "Capt. Smith left the ship. The night saw a storm.\n\n Capt. Smith saw the lamp."
    wanted = ["Capt. Smith left the ship.", "The night saw a storm.", "Capt. Smith saw the lamp."]
    assert train_splitter([STORY]).split(text) == wanted
    assert train_splitter(["no dots here"]).split(text) != wanted  # the control


def test_nothing_is_lost_but_the_space_between_sentences() -> None:
    found = train_splitter([STORY]).split(STORY)
    assert len(found) == 600
    assert "".join("".join(found).split()) == "".join(STORY.split())


def test_training_stops_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "TRAINING_CHARACTERS", 5000)
    monkeypatch.setattr(sentences, "_PIECE", 2000)
    drawn = []

    def texts() -> object:
        for i in range(1000):
            drawn.append(i)
            yield STORY[:1500]

    assert "first 5000 characters" in train_splitter(texts()).origin  # type: ignore[arg-type]
    assert len(drawn) < 10


def test_without_a_model_on_the_machine_the_corpus_is_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    assert load_splitter([STORY]).origin.startswith("punkt trained on")


def test_the_splitter_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "story.txt")],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
