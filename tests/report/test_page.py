"""The page through the command line: every section, the inputs' numbers, nothing from outside."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from megatron_prune.families.llama import LLAMA
from megatron_prune.model.axes import count_parameters
from megatron_prune.model.shape import ModelConfig
from megatron_prune.planning.choose import Targets
from megatron_prune.report.decisions import kept_mask
from megatron_prune.report.page import Section, Sheet, Table, page_html, with_unique_names
from tests.pico import directory_bytes, ok, refused
from tests.report.inputs import (
    DIGEST,
    SHAPE,
    candidates,
    make_scores,
    plan_of,
    write_plan,
    write_scores,
    write_search,
)

SECTIONS = {
    "result": "Result",
    "plan": "What the plan keeps",
    "attention-heads": "Attention heads",
    "query-groups": "Query groups",
    "ffn-channels": "FFN channels",
    "hidden-channels": "Hidden channels",
    "layers": "Layers",
    "overlap": "Overlap between criteria",
    "search": "What the budget search tried",
    "files": "Files and digests",
}
WITHOUT_PICTURES = ("result", "files")
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Sections' text by anchor, tables by caption, every attribute; checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self._section, self._caption, self._rows = "", "", []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        if tag == "table":
            self._caption, self._rows = "", []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        self.texts[self._section] = self.texts.get(self._section, "") + data
        if "caption" in self.open:
            self._caption += data
        if self.open and self.open[-1] in ("td", "th"):
            self._rows[-1][-1] += data


@dataclass(frozen=True)
class Report:
    folder: Path
    page: Path
    text: str
    reader: Reader

    def sheet(self, name: str) -> list[list[str]]:
        with open(self.folder / "png" / f"{name}.csv", newline="") as file:
            return list(csv.reader(file))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of scores, one plan and a search, with PNGs beside it."""
    folder = tmp_path_factory.mktemp("report")
    scores = make_scores()
    files = (
        write_scores(folder / "scores.safetensors", scores),
        write_plan(folder / "plan.json", plan_of(scores)),
        write_search(folder / "tried <b>.json"),
    )
    page = folder / "report.html"
    done = ok("report", *files, "--save", page, "--png-dir", folder / "png")
    assert f"wrote {page}" in done.out
    text = page.read_text()
    return Report(folder, page, text, Reader(text))


def test_the_page_has_every_section_and_links_to_it(report: Report) -> None:
    anchors = [
        value for tag, name, value in report.reader.attributes if (tag, name) == ("section", "id")
    ]
    assert anchors == list(SECTIONS)
    links = [v for tag, name, v in report.reader.attributes if (tag, name) == ("a", "href")]
    assert links == [f"#{anchor}" for anchor in SECTIONS]
    for anchor, title in SECTIONS.items():
        assert report.reader.texts[anchor].startswith(title)
    assert report.text.count("<svg ") >= len(SECTIONS) - len(WITHOUT_PICTURES)


def test_the_page_needs_nothing_but_itself(report: Report) -> None:
    for tag, name, value in report.reader.attributes:
        assert tag not in ("script", "link", "iframe", "object", "embed"), tag
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
    assert re.findall(r"url\((?!#)", report.text) == [] and "@import" not in report.text
    assert "default-src 'none'" in report.text


def test_ids_are_unique_and_every_reference_has_its_target(report: Report) -> None:
    ids = [value for _, name, value in report.reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', report.text))
    assert used <= set(ids), used - set(ids)


def test_the_page_shows_digests_provenance_shapes_and_costs(report: Report) -> None:
    plan, tables = plan_of(make_scores()), report.reader.tables
    files = {row[0]: row[2] for row in tables["Files this page was made from"][1:]}
    assert files == {
        name: directory_bytes(report.folder)[name]
        for name in ("scores.safetensors", "plan.json", "tried <b>.json")
    }
    facts = dict(tables["What was scored, how"][1:])
    assert facts["source model's digest"] == DIGEST and facts["tokens"] == "16,384"
    assert facts["data_digest"] == "da7a" * 16 and facts["layout"] == "pp: 1, tp: 3"
    assert facts["criteria (axes)"] == "activation (DFLQ), perplexity (L), wanda (DFQ)"
    decided = dict(tables["Plans"][1:])
    assert facts["digest of plan.json"] == plan.digest and decided["selection"] == "balance, TP=3"
    assert decided["dropped layers"] == str(({0, 1, 2, 3} - set(plan.layers)).pop())
    (sizes,) = (rows for caption, rows in tables.items() if caption.startswith("Shapes"))
    shown = {row[0]: row[1:] for row in sizes[1:]}
    for name, size in SHAPE.as_dict().items():
        assert shown[name] == [f"{size:,}", f"{plan.target.as_dict()[name]:,}"]
    for tied, what in ((True, "tied"), (False, "of its own")):
        config = ModelConfig(family=LLAMA, shape=SHAPE, tied=tied, hf_config={})
        counts = [count_parameters(replace(config, shape=s)) for s in (SHAPE, plan.target)]
        assert shown[f"parameters, output {what}"] == [f"{n:,}" for n in counts]
        assert shown[f"bytes in bf16, output {what}"] == [f"{2 * n:,}" for n in counts]
        assert shown[f"share of the source, output {what}"][1] == f"{counts[1] / counts[0]:.1%}"


def test_the_result_says_what_the_plan_keeps(
    report: Report, models: Callable[[str], Path], plans: Callable[[str], Path], tmp_path: Path
) -> None:
    assert " ".join(report.reader.texts["result"].split()) == (
        "Result plan.json keeps 3 of 4 layers, 36 of 48 hidden channels, 3 of 6 attention heads, "
        "60 of 96 FFN channels in a layer."
    )
    page, count = tmp_path / "page.html", json.loads(ok("inspect", models("gqa"), "--json").out)
    ok("report", plans("gqa"), "--load", models("gqa"), "--save", page)
    reader = Reader(page.read_text())
    kept = {row[0]: row[2] for row in reader.tables["Shapes and what they cost"][1:]}["parameters"]
    assert f": {kept} of {count['parameters']:,} parameters (" in reader.texts["result"]


@pytest.mark.parametrize(("axis", "name"), [("Q", "attention-heads"), ("F", "ffn-channels")])
def test_sheets_hold_each_unit_s_scores_and_decision(report: Report, axis: str, name: str) -> None:
    scores = make_scores()
    header, *rows = report.sheet(name)
    assert header[0] == "layer" and header[2:] == ["kept by plan.json", "activation", "wanda"]
    mask, size = kept_mask(plan_of(scores), axis), SHAPE.size(axis)
    assert len(rows) == SHAPE.num_layers * size
    for number, row in enumerate(rows):
        layer, unit = divmod(number, size)
        assert (int(row[0]), int(row[1])) == (layer, unit)
        assert bool(int(row[2])) == bool(mask[layer, unit])
        for cell, criterion in zip(row[3:], ("activation", "wanda")):
            assert torch.tensor(float(cell)) == scores.criteria[criterion][axis][layer, unit]


def test_sheets_of_the_model_s_axes_and_of_overlap(report: Report) -> None:
    scores, plan = make_scores(), plan_of(make_scores())
    header, *rows = report.sheet("layers")
    assert header == ["layer", "kept by plan.json", "activation", "perplexity"]
    assert [row[1] for row in rows] == [str(int(n in plan.layers)) for n in range(4)]
    assert [float(row[3]) for row in rows] == pytest.approx(
        scores.criteria["perplexity"]["L"].tolist()
    )
    rows = report.sheet("overlap")[1:]
    assert {row[1] for row in rows} == {
        "attention heads",
        "FFN channels",
        "hidden channels",
        "layers",
    }
    own = [row for row in rows if row[2] == "the plan" and row[3] == "activation"]
    assert [float(row[4]) for row in own] == [1.0] * 4
    for row in rows:
        assert f"{float(row[4]):.0%}" in report.reader.texts["overlap"]


def test_the_search_is_shown_measured_shapes_first(report: Report) -> None:
    (rows,) = (
        r for caption, r in report.reader.tables.items() if "the least loss first" in caption
    )
    tried = candidates()
    order = [tried[n] for n in (1, 2, 0, 3, 4)]
    assert [row[5] for row in rows[1:]] == [f"{c['parameters']:,}" for c in order]
    assert [row[6] for row in rows[1:]] == [f"{c['proxy']:.4f}" for c in order]
    assert [row[7] for row in rows[1:]] == ["4.1416", "5.1416", "", "", ""]
    sheet = report.sheet("candidates-tried-b")
    assert [[float(x or -1) for x in row] for row in sheet[1:]] == [
        [c.get(name, -1) for name in sheet[0]] for c in tried
    ]
    assert "shape of plan.json" in report.reader.texts["search"]


def test_every_picture_and_sheet_lies_in_the_png_dir(report: Report) -> None:
    names = {path.name for path in (report.folder / "png").iterdir()}
    assert {
        f"{name}.csv" for name in SECTIONS if name not in (*WITHOUT_PICTURES, "plan", "search")
    } <= names
    assert "shapes.csv" in names and "attention-heads-plan-activation.png" in names
    assert len([name for name in names if name.endswith(".png")]) == report.text.count("<svg ")
    for path in (report.folder / "png").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_user_s_text_is_text(report: Report) -> None:
    assert "tried <b>.json" in report.reader.texts["search"] and "<b>" not in report.text
    scores = replace(make_scores(), provenance={"model": "<script>alert(1)</script>"})
    write_scores(report.folder / "x.safetensors", scores)
    page = report.folder / "x.html"
    ok("report", report.folder / "x.safetensors", "--save", page)
    assert (
        "td", dict(Reader(page.read_text()).tables["What was scored, how"][1:])["model"]
    ) == ("td", "<script>alert(1)</script>")  # fmt: skip


@pytest.mark.parametrize(
    "hostile",
    [
        *("</title><script>x()</script>", '"><img src=x onerror=x()>'),
        *("' onload='x()", "]]></svg><svg/>"),
    ],
)
def test_hostile_names_are_text_wherever_they_stand(hostile: str, tmp_path: Path) -> None:
    """Of files, runs, domains, criteria and what is given as NAME=PATH."""
    named = hostile.replace("/", "\u2215")  # no name of a file has it
    plan = replace(plan_of(make_scores()), criterion=hostile)
    write_plan(tmp_path / f"{named}.json", plan)
    write_search(tmp_path / "s", proxy=hostile, target=hostile)
    run = tmp_path / f"{named}.run"
    run.mkdir()
    keys = {"lm loss": 2.0, f"domain loss/{hostile}": 1.0, f"domain weight/{hostile}": 0.5}
    rows = [{"iteration": n, "consumed-tokens": 10 * n, **keys} for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = {"iteration": 0, "processes": 1, "argv": [hostile], "version": hostile}
    (run / "commands.jsonl").write_text(json.dumps(line) + "\n")
    inputs = (tmp_path / f"{named}.json", f"{hostile.replace('=', ' ')}={tmp_path / 's'}", run)
    ok("report", *inputs, "--save", tmp_path / "page.html")
    found = Reader((tmp_path / "page.html").read_text())  # tags nest: nothing was closed early
    names = {name for _, name, _ in found.attributes}
    tags = {tag for tag, _, _ in found.attributes}
    assert not any(name.startswith("on") for name in names) and not tags & {"script", "img"}
    assert any(hostile in text for text in found.texts.values())


def test_the_same_inputs_give_the_same_page_and_overwrite_is_asked_for(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.json", plan_of(make_scores()))
    for name in ("a.html", "b.html"):
        ok("report", plan, "--save", tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    (tmp_path / "a.html").write_text("old")
    refused("report", plan, "--save", tmp_path / "a.html", says="exists; remove it or use --over")
    ok("report", plan, "--save", tmp_path / "a.html", "--overwrite")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html", "plan.json"]


def test_scores_alone_a_plan_alone_and_a_search_alone_are_shown(tmp_path: Path) -> None:
    scores = make_scores()
    for path, wanted in (
        (write_scores(tmp_path / "s", scores), set(SECTIONS) - {"result", "overlap", "search"}),
        (
            write_plan(tmp_path / "p", plan_of(scores)),
            set(SECTIONS) - {"overlap", "search", "query-groups"},
        ),
        (write_search(tmp_path / "c"), {"search", "files"}),
    ):
        ok("report", path, "--save", tmp_path / "page.html", "--overwrite")
        reader = Reader((tmp_path / "page.html").read_text())
        found = {v for tag, name, v in reader.attributes if (tag, name) == ("section", "id")}
        assert found == wanted


def test_several_plans_stand_side_by_side(tmp_path: Path) -> None:
    scores = make_scores()
    groups = plan_of(scores, Targets(num_query_groups=2, num_attention_heads=2), tp=1)
    composite = "hidden=wanda,heads=wanda,ffn=activation+wanda,layers=perplexity"
    files = (
        write_plan(tmp_path / "plan.json", plan_of(scores, expression=composite)),
        write_scores(tmp_path / "s", scores),
        write_plan(tmp_path / "groups.json", groups),
    )  # fmt: skip
    ok("report", *files, "--save", tmp_path / "page.html")
    reader = Reader((tmp_path / "page.html").read_text())
    (sizes,) = (rows for caption, rows in reader.tables.items() if caption.startswith("Shapes"))
    assert sizes[0] == ["size", "source", "plan.json", "groups.json"]
    assert "groups.json keeps 2 of 3 query groups" in reader.texts["query-groups"]
    assert reader.tables["Plans"][0] == ["plan", "plan.json", "groups.json"]
    assert "plan.json; activation+wanda scores" in reader.texts["ffn-channels"]
    assert "chosen by" not in reader.texts["ffn-channels"]


def test_a_plan_by_what_the_scores_do_not_hold_says_so(tmp_path: Path) -> None:
    scores = make_scores()
    plan = replace(plan_of(scores), criterion="random")
    files = (write_plan(tmp_path / "p", plan), write_scores(tmp_path / "s", scores))
    ok("report", *files, "--save", tmp_path / "page.html")
    texts = Reader((tmp_path / "page.html").read_text()).texts
    assert (
        "chosen by random, which the scores do not hold for this axis" in texts["hidden-channels"]
    )


def test_load_makes_parameters_exact_and_has_to_be_the_model(
    models: Callable[[str], Path], plans: Callable[[str], Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    ok("report", plans("gqa"), "--load", models("gqa"), "--save", page)
    tables = Reader(page.read_text()).tables
    shown = {row[0]: row[1] for row in tables["Shapes and what they cost"][1:]}
    inspected = json.loads(ok("inspect", models("gqa"), "--json").out)
    assert shown["parameters"] == f"{inspected['parameters']:,}"
    assert shown["bytes in fp32"] == f"{4 * inspected['parameters']:,}"
    message = refused(
        "report", plans("gqa"), "--load", models("twin"), "--save", tmp_path / "x.html"
    )
    assert "give the model they were made from" in message and not (tmp_path / "x.html").exists()


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    scores = make_scores()
    first = write_scores(tmp_path / "s", scores)
    other = write_plan(tmp_path / "p", plan_of(make_scores(digest="0dd" * 20)))
    save = ("--save", tmp_path / "page.html")
    message = refused("report", first, other, *save)
    assert "p is about model 0dd0dd0dd0dd0dd0, s about model 5eed5eed5eed5eed" in message
    wider = replace(SHAPE, ffn_hidden_size=192)
    edited = write_plan(tmp_path / "e", plan_of(make_scores(wider)))
    assert "'ffn_hidden_size': 192" in refused("report", first, edited, *save)
    foreign = write_search(tmp_path / "c", source=wider.as_dict())
    refused("report", first, foreign, *save, says="give files of one model")
    copy = write_scores(tmp_path / "s2", scores)
    refused("report", first, copy, *save, says="s and s2: 2 scores files; a page shows one")
    refused("report", first, first, *save, says="stands twice; name each file once")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not there; wanted scores (safetensors), a plan (JSON)"),
        (b"\x89PNG", "neither safetensors nor JSON: is a picture"),
        (b"", "neither safetensors nor JSON"),
        (b'{"loss": 3, "b": 1}', "JSON that holds a table of b, loss; wanted scores"),
        (b"[1, 2]", "JSON that holds list; wanted scores"),
        (b"[" * 100_000, "neither safetensors nor JSON"),
        (b'{"candidates": [3]}', "candidates[0]: found 3; wanted a table of num_layers"),
        (b'{"candidates": [{"num_layers": true}]}', "num_layers is True; wanted a whole number"),
        (b'{"version": 1, "kept": {}}', "not a plan"),
    ],
)
def test_what_is_no_input_is_named(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    message = refused("report", path, "--save", tmp_path / "page.html", says=says)
    assert str(path) in message


def test_candidates_with_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    path, save = tmp_path / "c.json", ("--save", tmp_path / "page.html")
    for name, value, says in (
        ("proxy", float("nan"), "proxy is nan; wanted a finite number"),
        ("loss", "low", "loss is 'low'; wanted a finite number"),
        ("parameters", 1.5, "parameters is 1.5; wanted a whole number"),
        ("costs", 3, "costs is 3; wanted a table"),
        ("costs", {"bytes": None}, "bytes is None; wanted a finite number"),
    ):
        rows = candidates()
        rows[2][name] = value
        path.write_text(json.dumps({"candidates": rows}))
        refused("report", path, *save, says=f"candidates[2]: {says}")


def test_scores_of_another_tool_or_a_directory_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    save = ("--save", tmp_path / "page.html")
    refused("report", tmp_path / "model.safetensors", *save, says="not a scores file")
    refused("report", tmp_path, *save, says="is a directory without sparsity.json; wanted scores")


def test_outputs_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    (tmp_path / "file").write_text("x")
    refused("report", missing, "--save", tmp_path, says="is a directory; wanted a file")
    refused("report", missing, "--save", tmp_path / "no" / "x", says="does not exist", code=4)
    save = ("--save", tmp_path / "page.html")
    refused("report", missing, *save, "--png-dir", tmp_path / "file", says="is a file; wanted a")
    refused("report", missing, *save, "--png-dir", missing / "a", says="does not exist", code=4)
    plan = write_plan(tmp_path / "plan.json", plan_of(make_scores()))
    refused("report", plan, "--save", plan, "--overwrite", says="one of the inputs; they never ch")


def test_a_png_dir_with_the_report_s_files_is_kept_unless_asked(tmp_path: Path) -> None:
    search = write_search(tmp_path / "c.json")
    directory = tmp_path / "png"
    directory.mkdir()
    (directory / "candidates-c.csv").write_text("mine")
    (directory / "notes.txt").write_text("mine")
    argv = ("report", search, "--save", tmp_path / "page.html", "--png-dir", directory)
    refused(*argv, says="holds candidates-c.csv already; choose another or use --overwrite")
    assert not (tmp_path / "page.html").exists() and len(list(directory.iterdir())) == 2
    ok(*argv, "--overwrite")
    assert (directory / "candidates-c.csv").read_text().startswith("num_layers,")
    assert (directory / "notes.txt").read_text() == "mine"


def test_a_page_of_other_sections_and_names_that_clash() -> None:
    """Another kind of report is another list of sections."""
    table = Table(header=("what", "a&b"), rows=[("x", "1.5"), ("y", "-")])
    sheets = [Sheet(name=name, header=(), rows=lambda: ()) for name in ("a", "A", "a")]
    section = Section(anchor="s", title="Runs & more", parts=[table], sheets=sheets)
    reader = Reader(page_html("T", "sub", [section]))
    assert reader.tables[""] == [["what", "a&b"], ["x", "1.5"], ["y", "-"]]
    (named,) = with_unique_names([section])
    assert [sheet.name for sheet in named.sheets] == ["a", "A-2", "a-3"]


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("is_dark", [False, True])
def test_a_browser_shows_the_pictures_in_light_and_in_dark(
    report: Report, tmp_path: Path, is_dark: bool
) -> None:
    """Under the page's own policy: its colours, heat maps, kept and dropped marks are there."""
    from PIL import Image

    shot = tmp_path / "shot.png"
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync "
        f"--window-size=1100,7000 --blink-settings=preferredColorScheme={0 if is_dark else 1}"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--screenshot={shot}", report.page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    image = Image.open(shot).convert("RGB")
    colors = {color: count for count, color in image.getcolors(1 << 24)}
    paper = (13, 17, 23) if is_dark else (255, 255, 255)
    assert max(colors, key=lambda color: colors[color]) == paper
    ink = (230, 237, 243) if is_dark else (27, 31, 36)
    for color in (ink, (253, 231, 37), (255, 90, 54), (47, 129, 214), (224, 123, 40)):
        assert colors.get(color, 0) > 20, color  # text, best score, outline, kept, dropped
