"""``evaluate --tasks``: shards at any layout answer as the harness' own backend on their export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.cli.recipe import expand_recipe
from megatron_prune.errors import ConfigError
from megatron_prune.evaluate.options import EvaluateOptions
from megatron_prune.evaluate.tasks import wanted_tasks
from tests.engine.on_ranks import Job, launch
from tests.launch import environment
from tests.pico import TEXT, ok, refused

REPOSITORY = Path(__file__).parents[2]
# Refuses a system message, which a task's description becomes: the harness then leaves it out.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}model:{% endif %}"
)
CHOICE = """
task: pico_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}", validation: "{data}"}}}}
output_type: multiple_choice
test_split: test
fewshot_split: validation
description: "Say which."
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
WAYS: dict[str, tuple[object, ...]] = {
    "whole": (),
    "limited": ("--limit", 5),
    "chat": ("--apply-chat-template",),
}
LAYOUTS: dict[str, tuple[int, tuple[object, ...]]] = {
    "one": (1, ()),
    "tp3": (3, ("--tensor-model-parallel-size", 3)),
    "pp2": (2, ("--pipeline-model-parallel-size", 2)),
    "dp2": (2, ()),
}


def in_a_process(*words: object, home: Path) -> None:
    """The harness reads HF_HOME when it is imported, and logs and seeds as it likes."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment(HF_HOME=str(home)), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files; a model with a chat template, whose tokenizer begins a text with <s>; as shards;
    exported; and a data set whose ``said`` is what it says to some questions, asked or chatting."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    model = shutil.copytree(models("gqa"), folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    pieces = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": pieces, "pair": pieces,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    to = ("--to", "megatron", "--tensor-model-parallel-size", 3)
    ok("convert", "--load", model, "--save", folder / "shards", *to)
    ok("convert", "--load", folder / "shards", "--save", folder / "export", "--to", "hf")
    data = _write_data(folder, model)
    (folder / "own").mkdir()
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("until", UNTIL)):
        (folder / "own" / f"{name}.yaml").write_text(text.format(data=data, until="e"))
    return folder


def _write_data(folder: Path, model: Path) -> Path:
    words = TEXT.split()
    rows: list[dict[str, Any]] = []
    for n in range(12):
        question = " ".join(words[n % 5 : n % 5 + 3 + n % 4])
        flags = ("--prompt", question, "--max-new-tokens", 10)
        asked = ok("generate", "--load", model, *flags).out[len(question) : -1].split("e")[0]
        chat = ok("generate", "--load", model, *flags, "--chat").out[:-1].split("e")[0]
        choices = [f" {words[(n + k) % len(words)]}" for k in (1, 5, 9)]
        long = " ".join(words[n % 7 :] * (1 + 4 * (n % 3)))  # the longest take several windows
        said = (asked, chat, "another")[n % 3]
        rows.append(
            {"question": question, "choices": choices, "answer": n % 3, "long": long, "said": said}
        )
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def words_of(load: Path, folder: Path, save: Path, *more: object) -> list[str]:
    given = ("--load", load, "--tasks", *NAMES, "--include-path", folder / "own", "--save", save)
    return [str(word) for word in ("evaluate", *given, "--micro-batch-size", 3, *more)]


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict[str, dict[str, Any]]:
    """What the harness by itself says of the exported directory, by the way it is asked."""
    script = Path(__file__).with_name("by_the_harness.py")
    in_a_process(script, folder / "export", folder / "own", folder / "wanted.json", home=folder)
    return dict(json.loads((folder / "wanted.json").read_text()))


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Layout and way -> what ``evaluate`` says of the shards there."""
    jobs = {}
    for layout, (world, flags) in LAYOUTS.items():
        for way, more in WAYS.items():
            save = folder / f"{layout}-{way}.json"
            words = words_of(folder / "shards", folder, save, *flags, *more)
            jobs[layout, way] = Job(check="command", world=world, given={"words": words})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder))
        codes = launch(list(jobs.values()), folder / "ranks", ranks=3)
    assert codes == [[0] * job.world for job in jobs.values()]
    return {(a, b): json.loads((folder / f"{a}-{b}.json").read_text()) for a, b in jobs}


def check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["n-shot"]["pico_choice"] == wanted["n-shot"]["pico_choice"] == 2
    assert found["n-samples"] == wanted["n-samples"]
    for task in ("pico_choice", "pico_rolling", "pico_until"):
        ours, theirs = found["results"][task], wanted["results"][task]
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            if isinstance(value, float):
                assert ours[key] == pytest.approx(value, rel=1e-5), (task, key)
            else:
                assert ours[key] == value, (task, key)


@pytest.mark.parametrize("way", WAYS)
def test_the_tasks_can_tell_models_apart(wanted: dict[str, Any], way: str) -> None:
    results = wanted[way]["results"]
    assert 0 < results["pico_choice"]["acc,none"] < 1
    assert 0 < results["pico_until"]["exact_match,none"] < 1
    assert results["pico_rolling"]["word_perplexity,none"] > 100


def test_the_ways_of_asking_give_different_results(wanted: dict[str, Any]) -> None:
    whole, limited, chat = (wanted[way]["results"] for way in ("whole", "limited", "chat"))
    assert wanted["limited"]["n-samples"]["pico_choice"]["effective"] == 5
    assert limited["pico_rolling"] != whole["pico_rolling"]
    assert chat["pico_choice"] != whole["pico_choice"]
    assert chat["pico_until"] != whole["pico_until"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_answer_as_the_harness_on_their_export(
    found: dict[Any, Any], wanted: dict[str, Any], layout: str, way: str
) -> None:
    told = found[layout, way]
    assert told["backend"] == "megatron"
    assert told["limit"] == (5 if way == "limited" else None)
    assert told["apply_chat_template"] is (way == "chat")
    check(told, wanted[way])


@pytest.mark.parametrize("way", ["limited", "chat"])
def test_a_hugging_face_directory_goes_to_the_harness(
    folder: Path, wanted: dict[str, Any], way: str
) -> None:
    save = folder / f"hf-{way}.json"
    words = words_of(folder / "export", folder, save, *WAYS[way])
    in_a_process("-m", "megatron_prune", *words, home=folder)
    told = json.loads(save.read_text())
    assert told["backend"] == "hf"
    check(told, wanted[way])


def test_refused_with_the_harness(models, folder: Path) -> None:
    load = ("evaluate", "--load", models("gqa"))
    refused(*load, "--tasks", "no_such_task", says="no_such_task: unknown to lm-evaluation-harness")
    refused(*load, "--tasks", "a", "--include-path", "/nowhere", says="/nowhere: is no directory")
    says = "has no chat template; leave it out"
    refused(*load, "--tasks", "a", "--apply-chat-template", says=says)
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
        (("--data", "b", "--apply-chat-template"), "--apply-chat-template goes with --tasks"),
        (("--tasks", "a", "--max-windows", 3), "--max-windows goes with --data"),
        (("--tasks", "a", "--num-fewshot", -1), "--num-fewshot -1; wanted 0 or more"),
        (("--tasks", "a:x"), "'a:x': wanted NAME or NAME:EXAMPLES"),
        (("--tasks", "a,a:2"), "a stands twice"),
    ],
)
def test_refused(models, flags: tuple[object, ...], says: str) -> None:
    refused("evaluate", "--load", models("gqa"), *flags, says=says)


def _wanted(*tasks: str, num_fewshot: int | None = None) -> dict[str, int | None]:
    options = EvaluateOptions(load=Path("model"), tasks=tasks, num_fewshot=num_fewshot)
    return wanted_tasks(options)


def test_examples_by_task() -> None:
    assert _wanted("a,b:25", "c", num_fewshot=3) == {"a": 3, "b": 25, "c": 3}
    with pytest.raises(ConfigError, match="stands twice"):
        _wanted("a", "a")


def test_the_recipe_is_the_list_of_the_field() -> None:
    recipe = REPOSITORY / "recipes" / "standard_tasks.yaml"
    words = expand_recipe("evaluate", ["--config", str(recipe)])
    tasks = _wanted(*words[1 : words.index("--config")])
    shots = {"arc_challenge": 25, "hellaswag": 10, "boolq": 32, "mmlu": 5}
    zero = dict.fromkeys(("sciq", "piqa", "winogrande", "arc_easy", "logiqa"), 0)
    assert tasks == {**zero, **shots}
    harness = pytest.importorskip("lm_eval.tasks")
    assert set(tasks) <= set(harness.TaskManager().all_tasks)
