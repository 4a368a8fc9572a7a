"""What other programs take: notebooks, Model Explorer, graph editors, pull requests, terminals."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import fxqfix
from fxqfix import Report
from fxqfix.errors import DataError, UnknownNameError
from fxqfix.measure import Histogram
from tests.report import samples

REPORTS = [
    samples.sample(), samples.exact_sample(), samples.hostile(), samples.many(30), Report(()),
]  # fmt: skip


class Nested(HTMLParser):
    """Refuses HTML whose tags don't nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"style"}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_public_record_shows_in_a_notebook() -> None:
    records = [getattr(fxqfix, name) for name in fxqfix.__all__]
    classes = [kind for kind in records if dataclasses.is_dataclass(kind)]
    assert len(classes) > 15
    assert [kind.__name__ for kind in classes if not hasattr(kind, "_repr_html_")] == []
    assert hasattr(fxqfix.Monitor, "_repr_html_")


def test_what_a_notebook_shows_is_sound() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    net = torch.nn.Sequential(torch.nn.Linear(4, 2)).train()
    prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    prepared.eval()
    report = fxqfix.compare(prepared, None, [3 * x], engine="fbgemm")
    found: list[Any] = [
        *REPORTS, report, report.rows[0], report.rows[0].prepared, report.rows[0].local,
        report.coverage, report.origin("_0"), report.diff(report), samples.inspection(),
        samples.inspection().sites[0], fxqfix.lint(prepared, engine="fbgemm"),
        fxqfix.certify(prepared, "export", [x]), fxqfix.extract_parameters(prepared),
        fxqfix.Monitor(prepared, x), samples.hostile().rows[0],
    ]  # fmt: skip
    for record in found:
        shown = record._repr_html_()
        tags = Nested(shown).tags
        assert "script" not in tags
        assert len(shown) < 30_000
    assert "range-lost" in report._repr_html_()
    assert "[0,127]" in report.rows[0].prepared._repr_html_()


def test_a_row_is_a_line() -> None:
    row = samples.sample().row("conv1")
    assert str(row) == (
        "conv1 (conv2d_relu): 57 of 16384 codes differ on the same inputs; 95 by now; SQNR 48.9; "
        "rounding 1, range-lost 56, upstream 38"
    )
    counted = dataclasses.replace(row, histogram=Histogram(0, (1,) * 256, (1,) * 256))
    assert len(repr(counted)) == len(repr(row))


@pytest.mark.parametrize("report", REPORTS)
def test_graphml_reads_back(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "graph.graphml"
    text = report.to_graphml(path)
    assert path.read_text(encoding="utf-8") == text
    graph = nx.read_graphml(path)
    for row in report.rows:
        name = row.name.replace("\n", "\ufffd") if row.name not in graph else row.name
        assert graph.nodes[name]["local_share"] == row.local_share


def test_model_explorer_takes_the_names_of_the_nodes() -> None:
    report = samples.sample()
    data = json.loads(report.to_model_explorer())
    assert data["results"].keys() == {"x", "conv1", "fc"}
    assert data["results"]["conv1"]["value"] == 100 * 57 / 16384
    assert [stop["stop"] for stop in data["gradient"]] == [0, 1]


@pytest.mark.parametrize("report", REPORTS)
def test_markdown_of_a_pull_request(report: Report, tmp_path: Path) -> None:
    text = report.to_markdown(tmp_path / "report.md")
    assert text.startswith("### fxqfix: ")
    assert text.count("<details>") == text.count("</details>") >= 1
    tables = [line for line in text.splitlines() if line.startswith("|")]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert bars == {8}
    tags = set(re.findall(r"<(/?\w+)", text))
    assert tags <= {"details", "/details", "summary", "/summary"}


def test_markdown_says_the_worst_first() -> None:
    lines = samples.sample().to_markdown().splitlines()
    assert lines[0] == "### fxqfix: not ok"
    first = next(i for i, line in enumerate(lines) if line.startswith("| ---"))
    assert lines[first + 1].startswith("| conv1.weight | conv2d\\_relu | 13 of 27 |")


@pytest.mark.parametrize("report", REPORTS)
def test_rich_shows_what_differs(report: Report) -> None:
    console = pytest.importorskip("rich.console")
    out = io.StringIO()
    console.Console(file=out, width=160).print(report)
    assert "fxqfix: " in out.getvalue()
    for row in report.rows[:5]:
        if not row.exact and row.name.isidentifier():
            assert row.name in out.getvalue()


KINDS = ("sites", "depth", "local", "causes", "sqnr")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("report", REPORTS)
def test_every_plot_is_drawn(report: Report, kind: str) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn = report.plot(kind=kind)
    ax = drawn[0] if kind == "sites" else drawn
    ax.figure.canvas.draw()
    plt.close(ax.figure)


def test_codes_are_drawn_as_counted() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    report = samples.sample()
    counts = Histogram(0, (1, 2, 3), (3, 2, 1))
    rows = tuple(dataclasses.replace(row, histogram=counts) for row in report.rows)
    ax = dataclasses.replace(report, rows=rows).plot(kind="codes", site="conv1")
    assert [list(step.get_data().values) for step in ax.patches] == [[1, 2, 3], [3, 2, 1]]
    plt.close(ax.figure)
    with pytest.raises(DataError, match="not counted"):
        report.plot(kind="codes", site="conv1")
    with pytest.raises(UnknownNameError, match="no plot is named 'pie'"):
        report.plot(kind="pie")
    plt.close("all")
