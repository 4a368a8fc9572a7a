from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxqfix.comparison import made_of
from fxqfix.report import Report, html, layout
from tests.report import samples

VOID = {"meta", "br", "input"}
# Attributes that load or run something are not among these.
ATTRIBUTES = {
    "aria-expanded", "aria-hidden", "aria-label", "aria-pressed", "aria-sort", "charset", "class",
    "content", "data-cause", "data-head", "data-row", "data-sort", "hidden", "href", "http-equiv",
    "id", "lang", "name", "role", "scope", "style", "tabindex", "type", "value",
}  # fmt: skip


class Page(HTMLParser):
    """Collects tags and text, and refuses a page whose tags don't nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert {name for name, _ in attrs} <= ATTRIBUTES
        links = [value for name, value in attrs if name == "href"]
        assert all(value and value.startswith("#") for value in links)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


REPORTS = [
    samples.sample(), samples.exact_sample(), samples.hostile(), samples.many(60), Report(()),
]  # fmt: skip


@pytest.mark.parametrize("report", REPORTS)
def test_page_is_sound_and_needs_nothing_else(report: Report) -> None:
    page = report.to_html()
    assert page.startswith("<!DOCTYPE html>")
    found = Page(page)
    assert not {"link", "img", "iframe", "object", "embed"} & set(found.tags)
    assert found.tags.count("script") == 2  # the data, and the page's own script
    assert "://" not in page
    assert "url(" not in page.replace("`url(#${", "")
    assert "default-src 'none'" in page


def test_hostile_names_stay_text() -> None:
    report = samples.hostile()
    page = report.to_html()
    found = Page(page)
    assert found.text.count(report.rows[0].name) >= 4
    assert data_of(page)["rows"][0]["name"] == report.rows[0].name
    assert "alert(" not in page.replace(r"\u003cscript\u003ealert(", "").replace(
        "&lt;script&gt;alert(", ""
    )


def test_page_shows_sites_causes_evidence_and_coverage(tmp_path: Path) -> None:
    report = samples.sample()
    found = Page(report.to_html(tmp_path / "report.html"))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.to_html()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]  # no part is left
    for text in (
        "48.1% of the codes of conv1.weight differ; most is added at x, 0.4% of its codes, by "
        "range-lost; convert with fxqfix.to_int8, or repair with fxqfix.repair; "
        "3 things could not be judged.",
        "not ok, differs in 4 of 5 rows, 2 sites left out",
        "stale-qparams: 13 codes",
        "input · [0,127] -> [0,255]",
        "range-lost 56",
        "5 sites paired: by dataflow 1, by name 4",
        "no converted site has its inputs",
        "observers were held still",
        "convert with fxqfix.to_int8, which holds them, or with fxqfix.to_decomposed, whose ops "
        "carry them",
    ):
        assert text in found.text, text
    rows = {row["name"]: row for row in data_of(report.to_html())["rows"]}
    assert rows["conv1"]["evidence"] == {"rounding": "1 code sits on a tie"}
    assert rows["conv1"]["accumulator"] == 874_800
    assert rows["fc"]["from"] == [row.name for row in report.rows].index("conv1")


def test_rows_are_marked_by_where_the_error_was_born() -> None:
    page = samples.sample().to_html()
    states = [page.count(f'class="{state} ') for state in ("differs", "inherits", "equal")]
    assert states == [3, 1, 1]


def test_inspection_page() -> None:
    found = Page(html.render_inspection(samples.inspection()))
    for text in ("conv1.weight", "36 -> 9", "uncalibrated", "no row of the op table"):
        assert text in found.text


def test_two_reports_stand_side_by_side() -> None:
    before = samples.sample()
    first = before.rows[0]
    better = replace(first, local=samples.apart(3072, 0), cumulative=samples.apart(3072, 0))
    after = replace(before, rows=(replace(better, causes={}), *before.rows[1:]))
    page = html.render(after, before, ("epoch 3", "epoch <9>"))
    found = Page(page)
    assert "epoch 3 → epoch <9>" in found.text
    assert "12 → 0" in found.text
    assert data_of(page)["rows"][0]["was"]["causes"] == [["range-lost", 12]]


@pytest.mark.parametrize("report", REPORTS)
def test_networkx_lays_out_where_there_is_no_dot(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout.shutil, "which", lambda name: None)
    graph = data_of(report.to_html())["graph"]
    assert graph["by"] == "networkx"
    boxes = {node["row"]: node["box"] for node in graph["nodes"]}
    for source, target, _ in graph["edges"]:
        assert boxes[source][1] < boxes[target][1]  # inputs above
    for row in {box[1] for box in boxes.values()}:
        level = sorted(box for box in boxes.values() if box[1] == row)
        for left, right in itertools.pairwise(level):
            assert left[0] + left[2] / 2 <= right[0] - right[2] / 2  # none covers another


def test_a_broken_dot_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "dot"
    broken.write_text("#!/bin/sh\necho graph 1 no numbers\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setattr(layout.shutil, "which", lambda name: str(broken))
    assert data_of(samples.sample().to_html())["graph"]["by"] == "networkx"


@pytest.mark.skipif(layout.shutil.which("dot") is None, reason="graphviz's dot is not installed")
def test_dot_lays_out_every_node_and_edge() -> None:
    graph = data_of(samples.many(60).to_html())["graph"]
    assert graph["by"] == "dot"
    assert len(graph["nodes"]) == 60
    assert all(len(points) >= 8 for *_, points in graph["edges"])
    tops = [node["box"][1] for node in graph["nodes"]]
    assert tops == sorted(tops)


def test_the_page_says_what_made_it_and_of_what() -> None:
    said = {"model": "<Net>", "fxqfix": "1.2", "torch": "2.13.0, build f", "date": "2026-11-27"}
    report = replace(samples.sample(), made=said)
    found = Page(report.to_html())
    assert found.text.count("fxqfix report: <Net>") == 2  # the title, and the heading
    assert any(t.endswith("fxqfix 1.2, torch 2.13.0, 2026-11-27") for t in found.text)
    assert Page(report.to_html(title="epoch <3>")).text.count("epoch <3>") == 2
    assert Report.from_json(report.to_json()).made == said
    other = replace(report, made={**said, "date": "2026-11-28"})
    merged = report.merge(other).merge(other)
    assert merged.made == {**said, "date": "2026-11-27 and 2026-11-28"}


def test_a_comparison_names_the_model_and_the_versions() -> None:
    class Net(nn.Sequential):
        pass

    made = made_of(None, fx.symbolic_trace(nn.Sequential(nn.ReLU())), Net())
    assert made["model"] == "Sequential"
    assert made_of(fx.GraphModule(nn.Module(), fx.Graph()), Net())["model"] == "Net"
    assert "model" not in made_of(None)
    assert made["torch"].startswith(torch.__version__)
    assert date.fromisoformat(made["date"]) >= date(2026, 1, 1)
