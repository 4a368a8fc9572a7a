from __future__ import annotations

import re
from dataclasses import replace

import networkx as nx
import pytest

from fxqfix.report import Report, dot
from tests.report import samples

STRING = r'"(?:[^"\\\n]|\\.)*"'
STATEMENT = re.compile(rf"  (?:node|{STRING}) \[\w+={STRING}(?:, \w+={STRING})*\];")
EDGE = re.compile(rf"  {STRING} -> {STRING};")


@pytest.mark.parametrize(
    "report", [samples.sample(), samples.hostile(), samples.many(5), Report(rows=())]
)
def test_every_line_is_a_statement_of_dot(report: Report) -> None:
    first, *middle, last = report.to_dot().splitlines()
    assert (first, last) == ("digraph fxqfix {", "}")
    for line in middle:
        assert STATEMENT.fullmatch(line) or EDGE.fullmatch(line), line


def test_graph_has_every_site_and_input() -> None:
    found = dot.graph(samples.sample())
    assert set(found.edges) == {
        ("x", "conv1"),
        ("conv1.weight", "conv1"),
        ("conv1", "fc"),
        ("fc.weight", "fc"),
        ("gone", "fc"),
    }
    assert nx.is_directed_acyclic_graph(found)
    assert "row" not in found.nodes["gone"]
    assert found.nodes["gone"]["style"] == "dashed"
    assert found.nodes["conv1"]["row"].name == "conv1"


def test_colour_grows_with_the_local_share() -> None:
    shades = [dot.graph(samples.many(60)).nodes[f"features_{i}_0"]["fillcolor"] for i in range(60)]
    assert shades[0] == "#ffffff"
    saturations = [float(shade.split()[1]) for shade in shades[1:]]
    assert saturations == sorted(set(saturations))
    assert 0.15 <= saturations[0] < saturations[-1] <= 0.9


def test_a_weight_stands_by_its_op() -> None:
    report = samples.sample()
    rows = [replace(row, inputs=("x",)) if row.name == "conv1" else row for row in report.rows]
    text = replace(report, rows=tuple(rows)).to_dot()
    assert text.count('"conv1.weight" -> "conv1"') == 1
    assert text.count('"fc.weight" -> "fc"') == 1
