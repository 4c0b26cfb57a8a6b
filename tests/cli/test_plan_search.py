"""`plan --target-...`: the table, the plan, the loss of the candidates, and what is refused."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prune import __version__
from megatron_prune.errors import ConfigError
from megatron_prune.families import read_config
from megatron_prune.model.axes import count_parameters
from megatron_prune.planning.latency import LatencyTable, LayerTime, OutputTime
from megatron_prune.planning.score_mass import DEFAULT_WEIGHTS
from megatron_prune.stages.quantities import (
    parse_latency,
    parse_memory,
    parse_parameters,
    parse_weights,
)
from tests.pico import TEXT, Done, ok, refused, run

Models, Shards = Callable[[str], Path], Callable[..., Path]
WINDOWS = ("--evaluate-seq-length", 48, "--max-windows", 2)
SIZES = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")


def rows_of(done: Done) -> list[list[float]]:
    """The numbers of the table: the source's, then each candidate's."""
    lines = done.out.split("  source    target")[0].splitlines()[1:-1]
    assert [line.split()[0] for line in lines] == ["source", *map(str, range(1, len(lines)))]
    return [[float(cell) for cell in line.split()[1:]] for line in lines]


def target_of(plan: Path) -> list[int]:
    values = json.loads(plan.read_text())["target"]
    return [values[name] for name in SIZES]


def latency_table(path: Path, seq: int = 48, batch: int = 1, **changes: Any) -> Path:
    """A machine whose time is the FLOPs of FFN and output, at 1 GFLOP/s."""
    flops = 1e-9 * 2 * seq * batch
    layers = [
        LayerTime(hidden=d, heads=q, groups=3, ffn=f, seconds=flops * 3 * d * f)
        for d in (24, 48)
        for q in (3, 6)
        for f in (48, 96)
    ]
    outputs = [OutputTime(hidden=d, vocab=379, seconds=flops * d * 379) for d in (24, 48)]
    table = LatencyTable(
        device="made up", threads=1, dtype="fp32", seq_length=seq, batch_size=batch,
        tensor_parallel=1, kv_channels=8, layers=tuple(layers), outputs=tuple(outputs),
    )  # fmt: skip
    path.write_text(replace(table, **changes).to_json())
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_text(TEXT * 40)
    return tmp_path / "text"


def test_the_plan_is_of_the_best_shape_within_the_parameters(
    models: Models, shards: Shards, tmp_path: Path
) -> None:
    plan = tmp_path / "p.json"
    for load, balance_for in ((models("gqa"), 1), (shards("gqa", "torch_dist", 3, 1), 3)):
        flags = ("--target-params", "80K", "--candidates", 3, "--overwrite")
        source, *found = rows_of(ok("plan", "--load", load, "--save", plan, *flags))
        assert source[:5] == [4, 48, 6, 3, 96] and len(found) == 3
        assert target_of(plan) == found[0][:5]
        assert [row[-1] for row in found] == sorted(row[-1] for row in found)
        for row in found:
            assert row[4] % balance_for == 0 and row[1] % row[2] == 0  # Llama's loader wants it
        values = json.loads(plan.read_text())
        assert values["balance_for"] == balance_for
    pruned = ("--load", models("gqa"), "--save", tmp_path / "out", "--to", "hf", "--plan", plan)
    ok("prune", *pruned)
    assert count_parameters(read_config(tmp_path / "out/config.json")) <= 80_000


def test_named_sizes_and_layers_stay_as_named(models: Models, tmp_path: Path) -> None:
    plan = tmp_path / "p.json"
    flags = ("--target-params", "80K", "--num-attention-heads-remain", 3, "--drop-layers", "2")
    for row in rows_of(ok("plan", "--load", models("gqa"), "--save", plan, *flags))[1:]:
        assert (row[0], row[2]) == (3, 3)
    assert json.loads(plan.read_text())["kept"]["layers"] == [0, 1, 3]


def test_memory_and_latency_bound_the_shape(models: Models, tmp_path: Path) -> None:
    """Costs in the candidates' file are the budgets'; a share of the source's latency too."""
    table = latency_table(tmp_path / "t.json", seq=64, batch=2, dtype="bf16")
    file = tmp_path / "c.json"
    load = ("--load", models("gqa"), "--save", tmp_path / "p.json", "--overwrite")
    flags = ("--target-memory", "600KiB", "--at-seq", 64, "--at-batch", 2, "--at-dtype", "bf16")
    whole = 1e-9 * 2 * 128 * (4 * 3 * 48 * 96 + 48 * 379)
    for latency in (f"{whole * 500}ms", "50%"):
        given = ("--target-latency", latency, "--latency-table", table, "--candidates-json", file)
        done = ok("plan", *load, *flags, *given)
        assert "t.json: measured on made up with 2 x 64 tokens in bf16 at TP 1" in done.err
        values = json.loads(file.read_text())
        assert values["budgets"]["seconds"]["limit"] == pytest.approx(whole / 2)
        assert values["budgets"]["bytes"]["limit"] == 600 * 1024
        for row in values["candidates"]:
            if "rank" in row:
                assert row["costs"]["seconds"] <= whole / 2 * (1 + 1e-9)
                assert row["costs"]["bytes"] <= 600 * 1024
        assert rows_of(done)[0][-2] == pytest.approx(whole * 1e3, abs=0.06)  # the column of ms


def test_without_a_table_latency_is_counted_in_flops_and_that_is_said(
    models: Models, tmp_path: Path
) -> None:
    save = ("--save", tmp_path / "p.json")
    done = ok("plan", "--load", models("gqa"), *save, "--target-latency", "60%", "--at-seq", 64)
    assert "without --latency-table: counted in FLOPs a token at 64 tokens" in done.err


def test_the_candidates_file_holds_the_ranked_and_the_front(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    load = ("--load", models("gqa"), "--save", tmp_path / "p.json")
    ok("plan", *load, "--target-params", "80K", "--candidates", 4, "--candidates-json", file)
    values = json.loads(file.read_text())
    rows = values["candidates"]
    assert [row["rank"] for row in rows if "rank" in row] == [1, 2, 3, 4]
    assert [rows[0][name] for name in SIZES] == target_of(tmp_path / "p.json")
    front = [row for row in rows if "rank" not in row]
    assert front[-1]["parameters"] == values["source_parameters"] and front[-1]["proxy"] == 0
    assert front[0]["parameters"] < 80_000 < front[-1]["parameters"]
    assert values["budgets"] == {"parameters": {"flag": "--target-params", "limit": 80_000.0}}
    assert len({tuple(row[name] for name in SIZES) for row in rows}) == len(rows)


def test_the_report_reads_the_candidates_file(models: Models, tmp_path: Path) -> None:
    file, load = tmp_path / "c.json", ("--load", models("gqa"), "--save", tmp_path / "p.json")
    ok("plan", *load, "--target-params", "80K", "--candidates-json", file)
    from megatron_prune.report.inputs import read_inputs

    (search,) = read_inputs([file]).searches.values()
    assert len(search.candidates) == len(json.loads(file.read_text())["candidates"])


def test_the_candidate_with_the_least_loss_is_planned(
    models: Models, text: Path, tmp_path: Path
) -> None:
    """The table's losses are those that `evaluate` finds of the pruned models."""
    plan, file = tmp_path / "p.json", tmp_path / "c.json"
    flags = ("--target-params", "80K", "--candidates", 3, "--candidates-json", file)
    load = ("--load", models("gqa"), "--save", plan)
    _, *found = rows_of(ok("plan", *load, *flags, "--evaluate-data", text, *WINDOWS))
    losses = [row[-1] for row in found]
    assert losses == sorted(losses) and len(set(losses)) == 3
    assert target_of(plan) == found[0][:5]
    pruned, judged = tmp_path / "pruned", tmp_path / "judged.json"
    ok("prune", "--load", models("gqa"), "--save", pruned, "--to", "hf", "--plan", plan)
    words = ("--seq-length", 48, "--max-windows", 2, "--json", judged)
    ok("evaluate", "--load", pruned, "--data", text, *words)
    wanted = json.loads(judged.read_text())["loss"]
    assert losses[0] == pytest.approx(wanted, abs=1e-4)
    values = json.loads(file.read_text())
    assert all(values["weights"][name] != weight for name, weight in DEFAULT_WEIGHTS.items())
    ranked = [row for row in values["candidates"] if "rank" in row]
    assert [row["loss"] for row in ranked] == pytest.approx(losses, abs=1e-4)
    assert ranked[0]["loss"] == pytest.approx(wanted, abs=1e-6)


def test_losses_are_cached_by_model_plan_and_text(
    models: Models, text: Path, tmp_path: Path
) -> None:
    cache, again = tmp_path / "cache", ("--overwrite", "--candidates", 3, *WINDOWS)
    flags = ("--target-params", "80K", "--evaluate-data", text, "--cache", cache, *again)

    def cached(kind: str, *more: object) -> int:
        done = ok("plan", "--load", models(kind), "--save", tmp_path / "p", *flags, *more)
        assert done.err.count("candidate ") == 3 and done.err.count("probe ") == 4
        return done.err.count("(cached)")

    assert cached("gqa") == 1 and len(list(cache.iterdir())) == 8  # the source serves twice
    before = (tmp_path / "p").read_bytes()
    assert cached("gqa") == 9 and (tmp_path / "p").read_bytes() == before
    next(cache.iterdir()).unlink()  # as if it had been stopped before the last one
    assert cached("gqa") in (7, 8)
    assert cached("twin") == 1 and cached("gqa", "--max-windows", 1) == 1
    assert cached("gqa", "--seed", 5) == 1
    text.write_text(TEXT * 41)
    assert cached("gqa") == 1
    for file in cache.iterdir():
        file.write_text("{}")
    message = refused(
        "plan", "--load", models("gqa"), "--save", tmp_path / "q", *flags, code=3,
        says="not what was written here",
    )  # fmt: skip
    assert f"--cache {cache}" in message and not (tmp_path / "q").exists()


def test_candidates_are_repaired_before_they_are_judged(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `prune --repair --norm-rescale` would make them."""
    plan, cache = tmp_path / "p.json", tmp_path / "cache"
    load = ("--load", models("gqa"), "--save", plan, "--overwrite", "--cache", cache)
    flags = ("--target-params", "80K", "--candidates", 2, "--evaluate-data", text, *WINDOWS)
    ok("plan", *load, *flags)
    (tmp_path / "calibration").write_text(text.read_text())
    repair = ("--repair-data", tmp_path / "calibration", "--repair-samples", 4)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # may be small: 40% of a model lies there
    _, best, _ = rows_of(ok("plan", *load, *flags, *repair))
    monkeypatch.undo()
    names = {"cache", "calibration", "p.json", "text"}
    assert {path.name for path in tmp_path.iterdir()} == names
    keys = [json.loads(file.read_text()) for file in cache.iterdir()]
    assert len(keys) == 14  # repaired and plain are two things
    assert {key["version"] for key in keys} == {__version__}
    pruned, judged = tmp_path / "pruned", tmp_path / "judged.json"
    ok(
        "prune", "--load", models("gqa"), "--save", pruned, "--to", "hf", "--plan", plan,
        "--repair", "--norm-rescale", "--data", text, "--num-samples", 4, "--seq-length", 48,
    )  # fmt: skip
    words = ("--seq-length", 48, "--max-windows", 2, "--json", judged)
    ok("evaluate", "--load", pruned, "--data", text, *words)
    assert best[-1] == pytest.approx(json.loads(judged.read_text())["loss"], abs=1e-4)
    with open(tmp_path / "calibration", "a") as file:
        file.write("What is never read changes no window.")
    assert ok("plan", *load, *flags, *repair).err.count("(cached)") == 8
    (tmp_path / "calibration").write_text("Other words. " + text.read_text())
    assert ok("plan", *load, *flags, *repair).err.count("(cached)") == 1  # the source, once again


def test_a_source_that_fits_is_left_as_it_is(models: Models, tmp_path: Path) -> None:
    save = ("--save", tmp_path / "p.json")
    done = ok("plan", "--load", models("gqa"), *save, "--target-params", "1B")
    assert "the source meets the budget as it is" in done.err
    assert set(json.loads((tmp_path / "p.json").read_text())["kept"].values()) == {None}


BAD: list[tuple[tuple[object, ...], str]] = [
    (("--target-params", "many"), "--target-params 'many': wanted a number such as 3.4e9"),
    (("--target-params", "-3"), "--target-params '-3': wanted a number"),
    (("--target-params", "0"), "--target-params '0': wanted a number"),
    (("--target-memory", "8"), "--target-memory '8': wanted a size such as 8GiB"),
    (("--target-latency", "20"), "--target-latency '20': wanted a time such as 20ms"),
    (("--target-latency", "20ms"), "a time needs --latency-table"),
    (("--target-latency", "20ms", "--latency-table", "/no"), "--latency-table /no"),
    (("--candidates", 3), "--candidates: belongs to a search; say for what budget"),
    (("--drop-query-groups",), "--drop-query-groups: belongs to a search"),
    (("--target-params", "80K", "--cache", "x"), "--cache: needs --evaluate-data"),
    (("--target-params", "80K", "--repair-data", "x"), "--repair-data: needs --evaluate-data"),
    (("--target-params", "80K", "--evaluate-data", "/no"), "/no: is not a file"),
    (("--target-params", "80K", "--proxy-weights", "hidden"), "wanted such as hidden=2,ffn=0.5"),
    (("--target-params", "80K", "--proxy-weights", "width=2"), "--proxy-weights width=2: wanted"),
    (("--target-params", "80K", "--candidates-json", "{load}/c"), "is or lies in"),
    (("--target-params", "80K", "--candidates-json", "{load}"), "is a directory; wanted a file"),
    (("--target-params", "80K", "--candidates-json", "{here}/p"), "is --save, the plan's own"),
    (
        ("--target-params", "80K", "--evaluate-data", "{text}", "--cache", "{load}/cache"),
        "is or lies in",
    ),
    (("--target-params", "80K", "--at-seq", 64), "--at-seq: needs --target-memory or --target-l"),
    (("--target-params", "80K", "--at-batch", 2), "--at-batch: needs --target-memory or --lat"),
    (("--target-params", "80K", "--balance-for", 2), "tensor-model-parallel-size 2 does not"),
    (("--target-params", "80K", "--min-layers", 5), "--min-layers 5: the model has 4"),
    (
        ("--target-params", "9K", "--min-layers", 4),
        "--target-params 0.009 M parameters: no legal shape is so small; nearest: 4 layers, hidden",
    ),
]


@pytest.mark.parametrize(("flags", "says"), BAD, ids=lambda x: str(x)[:50])
def test_what_cannot_be_searched_is_refused_and_leaves_nothing(
    flags: tuple[object, ...], says: str, models: Models, tmp_path: Path
) -> None:
    if "-3" in flags:
        flags = ("--target-params=-3",)
    places = {"load": models("gqa"), "here": tmp_path, "text": __file__}
    flags = tuple(str(flag).format(**places) for flag in flags)
    refused("plan", "--load", models("gqa"), "--save", tmp_path / "p", *flags, says=says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--save", "--candidates-json"])
def test_an_output_is_no_input(flag: str, models: Models, text: Path, tmp_path: Path) -> None:
    before = text.read_bytes()
    load = ("--load", models("gqa"), "--save", tmp_path / "p", "--target-params", "80K")
    given = ("--evaluate-data", text, "--overwrite", flag, text)
    refused("plan", *load, *given, says=f"{flag} {text}: is or lies in {text}, one of the inputs")
    assert text.read_bytes() == before and [x.name for x in tmp_path.iterdir()] == ["text"]


def test_candidates_are_kept_without_overwrite(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text("mine")
    load = ("--load", models("gqa"), "--save", tmp_path / "p", "--target-params", "80K")
    given = ("--candidates-json", file)
    refused("plan", *load, *given, says=f"--candidates-json {file}: exists; remove it or use --ov")
    assert file.read_text() == "mine" and not (tmp_path / "p").exists()


def test_a_dry_run_writes_nothing(models: Models, text: Path, tmp_path: Path) -> None:
    load = ("--load", models("gqa"), "--save", tmp_path / "p", "--target-params", "80K")
    outputs = ("--candidates-json", tmp_path / "c", "--cache", tmp_path / "cache")
    repair = ("--repair-data", text, "--repair-samples", 2, "--candidates", 1)
    done = ok("plan", *load, *outputs, "--evaluate-data", text, *WINDOWS, *repair, "--dry-run")
    assert len(rows_of(done)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_candidates_are_not_tried_under_torchrun(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    load = ("--load", models("gqa"), "--save", tmp_path / "p", "--target-params", "80K")
    says = "--evaluate-data under torchrun with 2 processes: candidates are tried one after"
    refused("plan", *load, "--evaluate-data", text, says=says)


def test_bytes_of_the_table_are_in_the_dtype_asked_for(models: Models, tmp_path: Path) -> None:
    load = ("--load", models("gqa"), "--save", tmp_path / "p", "--target-params", "80K")
    rows = {
        dtype: rows_of(ok("plan", *load, "--overwrite", "--at-dtype", dtype))
        for dtype in ("fp32", "bf16")
    }
    for wide, narrow in zip(rows["fp32"], rows["bf16"]):
        assert narrow[6] == pytest.approx(wide[6] / 2, abs=0.06)  # MB, of one decimal
        assert narrow[7] == pytest.approx(wide[7] / 2, abs=0.06) and wide[7] > 0.3  # KV kB/tok


@pytest.mark.parametrize(
    ("flags", "changes", "says"),
    [
        (("--at-seq", 64), {}, "asked for is --at-seq 64; measure again so, or give --at-seq 48"),
        (("--at-batch", 2), {}, "asked for is --at-batch 2; measure again so"),
        (("--at-dtype", "bf16"), {}, "asked for is --at-dtype bf16"),
        (("--balance-for", 3), {}, "asked for is --balance-for 3"),
        ((), {"tensor_parallel": 3}, "at TP 3, asked for is --balance-for 1; measure again so"),
    ],
)
def test_a_table_of_other_conditions_is_refused(
    flags: tuple[object, ...], changes: dict[str, Any], says: str, models: Models, tmp_path: Path
) -> None:
    table = latency_table(tmp_path / "t.json", **changes)
    load = ("--load", models("gqa"), "--save", tmp_path / "p", "--latency-table", table)
    message = refused("plan", *load, "--target-latency", "50%", *flags, says=says)
    assert "measured on made up with 1 x 48 tokens in fp32 at TP " in message


def test_a_table_of_another_model_is_refused(models: Models, tmp_path: Path) -> None:
    table = latency_table(tmp_path / "t.json", kv_channels=64)
    flags = ("--target-latency", "50%", "--latency-table", table)
    load = ("--load", models("gqa"), "--save", tmp_path / "p")
    refused("plan", *load, *flags, says="measured with kv_channels 64, the model has 8")


def test_axes_that_the_scores_lack_are_kept_whole_and_that_is_said(
    models: Models, text: Path, tmp_path: Path
) -> None:
    scores = tmp_path / "s.safetensors"
    what = ("--criterion", "residual-energy", "--data", text, "--seq-length", 48)
    ok("score", "--load", models("gqa"), "--save", scores, *what, "--num-samples", 2)
    load = ("--load", models("gqa"), "--save", tmp_path / "p.json")
    flags = ("--scores", scores, "--criterion", "residual-energy", "--target-params", "100K")
    done = ok("plan", *load, *flags)
    assert "residual-energy does not score layers, heads, ffn: kept whole" in done.err
    layers, hidden, *rest = target_of(tmp_path / "p.json")
    assert (layers, rest) == (4, [6, 3, 96]) and hidden < 48
    more = ("--overwrite", "--drop-query-groups")
    assert "heads, ffn, query groups: kept whole" in ok("plan", *load, *flags, *more).err
    done = ok("plan", *load, *flags, "--overwrite", "--drop-layers", 1)  # named: no score needed
    assert "does not score heads, ffn: kept whole" in done.err
    assert target_of(tmp_path / "p.json")[0] == 3
    named = ("--ffn-hidden-size-remain", 48, "--overwrite", "--evaluate-data", text, *WINDOWS)
    says = "axis F: 48 of 96 are asked for, and --criterion residual-energy does not score it"
    message = refused("plan", *load, *flags, *named, says=says)
    assert message.count("loss") == 0
    ok("plan", *load, *flags, "--ffn-hidden-size-remain", 96, "--overwrite")  # all stay: no score


def test_profile_measures_what_plan_reads(models: Models, tmp_path: Path) -> None:
    table = tmp_path / "t.json"
    flags = ("--seq-length", 48, "--batch-size", 2, "--repeats", 1)
    done = ok("profile", "--load", models("gqa"), "--save", table, *flags)
    values: dict[str, Any] = json.loads(table.read_text())
    assert (values["seq_length"], values["batch_size"], values["kv_channels"]) == (48, 2, 8)
    found = {(x["hidden"], x["heads"], x["ffn"]) for x in values["layers"]}
    assert found == {(d, q, f) for d in (48, 36, 24) for q in (6, 3) for f in (96, 48)}
    assert [x["hidden"] for x in values["outputs"]] == [48, 36, 24]
    assert "largest error of the fit" in done.out and "2 x 48 tokens" in done.out
    save = ("--save", tmp_path / "p.json", "--latency-table", table)
    out = ok("plan", "--load", models("gqa"), *save, "--target-latency", "70%").out
    assert " ms " in out.splitlines()[0]
    refused("profile", "--load", models("gqa"), "--save", table, says="exists; remove it")
    stages = ("--pipeline-model-parallel-size", 2)
    done = run("profile", "--load", models("gqa"), "--save", tmp_path / "x", *stages)
    assert done.code == 2 and not (tmp_path / "x").exists()
    longer = ("--save", tmp_path / "x", "--seq-length", 200)
    refused("profile", "--load", models("gqa"), *longer, says="max_position_embeddings 128")


def test_numbers_with_units() -> None:
    assert parse_parameters("3.4e9") == parse_parameters("3.4B") == parse_parameters("3400M")
    assert parse_parameters("12000") == parse_parameters("12k") == 12000
    assert parse_memory("1.5GiB") == 1.5 * 2**30 and parse_memory("8 GB") == 8e9
    assert parse_latency("20ms") == (0.02, False) and parse_latency("60%") == (0.6, True)
    assert parse_weights("hidden=2, ffn=0.5") == {"hidden": 2.0, "ffn": 0.5}
    for parse, text in (
        (parse_parameters, "1e999"), (parse_parameters, "1.2.3"), (parse_parameters, "3GiB"),
        (parse_memory, "nan"), (parse_latency, "ms"), (parse_weights, ""), (parse_weights, "a=b"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="wanted"):
            parse(text)
