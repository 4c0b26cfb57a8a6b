"""``evaluate --tasks``: shards at any layout answer as the harness' Hugging Face backend does."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.cli.recipe import expand_recipe
from megatron_prune.errors import ConfigError
from megatron_prune.evaluate.tasks import parse_tasks
from tests.engine.on_ranks import Job, environment, launch
from tests.pico import TEXT, ok, refused

REPOSITORY = Path(__file__).parents[2]
CHOICE = """
task: pico_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}", validation: "{data}"}}}}
output_type: multiple_choice
test_split: test
fewshot_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: pico_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{long}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
UNTIL = """
task: pico_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["{until}"], max_gen_toks: 10, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
NAMES = ("pico_choice:2", "pico_rolling", "pico_until")


def in_a_process(*words: object, home: Path) -> None:
    """The harness reads HF_HOME when it is imported, and logs and seeds as it likes."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_prune", *map(str, words)],
        env=environment(HF_HOME=str(home)), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files, and a data set whose ``said`` is what the model says to half of its questions."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    words = TEXT.split()
    rows: list[dict[str, Any]] = []
    for n in range(12):
        question = " ".join(words[n % 5 : n % 5 + 3 + n % 4])
        flags = ("--prompt", question, "--max-new-tokens", 10)
        said = ok("generate", "--load", models("gqa"), *flags).out[len(question) : -1]
        choices = [f" {words[(n + k) % len(words)]}" for k in (1, 5, 9)]
        long = " ".join(words[n % 7 :] * (1 + 4 * (n % 3)))  # the longest take several windows
        said = said.split("e")[0] if n % 2 else "another"
        rows.append(
            {"question": question, "choices": choices, "answer": n % 3, "long": long, "said": said}
        )
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own").mkdir()
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("until", UNTIL)):
        (folder / "own" / f"{name}.yaml").write_text(text.format(data=data, until="e"))
    return folder


def words_of(load: Path, folder: Path, save: Path, *more: object) -> list[str]:
    given = ("--load", load, "--tasks", *NAMES, "--include-path", folder / "own", "--save", save)
    return [str(word) for word in ("evaluate", *given, "--micro-batch-size", 3, *more)]


@pytest.fixture(scope="module")
def wanted(models, folder: Path) -> dict[str, Any]:
    """What the harness' own backend says of the Hugging Face directory."""
    save = folder / "hf.json"
    in_a_process(*words_of(models("gqa"), folder, save), home=folder / "home")
    found = json.loads(save.read_text())
    assert found["backend"] == "hf"
    return dict(found)


def check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["backend"] == "megatron" and found["lm_eval"] == wanted["lm_eval"]
    assert found["n-shot"]["pico_choice"] == wanted["n-shot"]["pico_choice"] == 2
    for task in ("pico_choice", "pico_rolling", "pico_until"):
        ours, theirs = found["results"][task], wanted["results"][task]
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            if isinstance(value, float):
                assert ours[key] == pytest.approx(value, rel=1e-5), (task, key)
            else:
                assert ours[key] == value, (task, key)


def test_the_tasks_can_tell_models_apart(wanted: dict[str, Any]) -> None:
    results = wanted["results"]
    assert 0 < results["pico_choice"]["acc,none"] < 1
    assert 0 < results["pico_until"]["exact_match,none"] < 1
    assert results["pico_rolling"]["word_perplexity,none"] > 100


def test_one_process_answers_as_transformers(models, folder: Path, wanted: dict[str, Any]) -> None:
    save = folder / "one.json"
    words = words_of(models("gqa"), folder, save, "--backend", "megatron")
    in_a_process(*words, home=folder / "home")
    check(json.loads(save.read_text()), wanted)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("tp3", ("--tensor-model-parallel-size", 3)),
        ("pp2", ("--pipeline-model-parallel-size", 2)),
        ("dp2", ()),
    ],
)
def test_shards_answer_as_transformers(
    shards, folder: Path, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    name: str, layout: tuple[object, ...],
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    save, ranks = folder / f"{name}.json", 3 if name == "tp3" else 2
    words = words_of(shards("gqa", "torch_dist", 3), folder, save, *layout)
    jobs = [Job(check="command", world=ranks, given={"words": words})]
    assert launch(jobs, folder / f"ranks-{name}", ranks=ranks) == [[0] * ranks]
    found = json.loads(save.read_text())
    check(found, wanted)


def test_a_limit_and_other_questions_give_other_results(
    models, folder: Path, wanted: dict[str, Any]
) -> None:
    save = folder / "limited.json"
    in_a_process(*words_of(models("gqa"), folder, save, "--limit", 2), home=folder / "home")
    found = json.loads(save.read_text())
    assert found["limit"] == 2 and found["n-samples"]["pico_choice"]["effective"] == 2
    assert found["results"]["pico_rolling"] != wanted["results"]["pico_rolling"]


def test_refused_with_the_harness(models, folder: Path) -> None:
    load = ("evaluate", "--load", models("gqa"))
    refused(*load, "--tasks", "no_such_task", says="no_such_task: unknown to lm-evaluation-harness")
    refused(*load, "--tasks", "a", "--include-path", "/nowhere", says="/nowhere: is no directory")
    (folder / "bad").mkdir()
    text = CHOICE.replace("pico_choice", "pico_bad").format(data="/nowhere.jsonl")
    (folder / "bad" / "bad.yaml").write_text(text)
    flags = ("--include-path", folder / "bad")
    refused(*load, "--tasks", "pico_bad", *flags, says="pico_bad: its data cannot be read")


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-evaluation-harness is here")
def test_without_the_harness_it_says_what_to_install(models) -> None:
    says = "not installed; pip install 'megatron_prune[eval]'"
    refused("evaluate", "--load", models("gqa"), "--tasks", "piqa", says=says)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "give one of --data TEXT, --domains RECIPE and --tasks"),
        (("--tasks", "a", "--data", "b"), "give one of --data TEXT"),
        (("--data", "b", "--limit", 3), "--limit goes with --tasks"),
        (("--tasks", "a", "--max-windows", 3), "--max-windows goes with --data"),
        (("--tasks", "a", "--num-fewshot", -1), "--num-fewshot -1; wanted 0 or more"),
        (("--tasks", "a:x"), "'a:x': wanted NAME or NAME:EXAMPLES"),
        (("--tasks", "a,a:2"), "a stands twice"),
    ],
)
def test_refused(models, flags: tuple[object, ...], says: str) -> None:
    refused("evaluate", "--load", models("gqa"), *flags, says=says)


def test_examples_by_task() -> None:
    assert parse_tasks(["a,b:25", "c"], 3) == {"a": 3, "b": 25, "c": 3}
    with pytest.raises(ConfigError, match="stands twice"):
        parse_tasks(["a", "a"], None)


def test_the_recipe_is_the_list_of_the_field() -> None:
    recipe = REPOSITORY / "recipes" / "standard_tasks.yaml"
    words = expand_recipe("evaluate", ["--config", str(recipe)])
    tasks = parse_tasks(words[1 : words.index("--config")], None)
    shots = {"arc_challenge": 25, "hellaswag": 10, "boolq": 32, "mmlu": 5}
    zero = dict.fromkeys(("sciq", "piqa", "winogrande", "arc_easy", "logiqa"), 0)
    assert tasks == {**zero, **shots}
    harness = pytest.importorskip("lm_eval.tasks")
    assert set(tasks) <= set(harness.TaskManager().all_tasks)
