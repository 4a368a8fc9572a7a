from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest

from fxqfix.report import Report, palette
from tests.report import samples

mpl.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def close_figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plt, "show", lambda *_: pytest.fail("plot must not show anything"))
    yield
    plt.close("all")


@pytest.mark.parametrize("count", [0, 1, 5, 25, 60])
def test_labels_do_not_overlap_at_any_size(count: int, tmp_path: Path) -> None:
    upper, lower = samples.many(count).plot()
    figure = lower.figure
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    labels = [label for label in lower.get_xticklabels() if label.get_text()]
    assert len(labels) == count
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))
    assert all(box.y0 >= 0 for box in boxes)
    assert not any(label.get_visible() for label in upper.get_xticklabels()) or count == 0


def test_of_many_sites_the_worst_are_named(tmp_path: Path) -> None:
    _, lower = samples.many(160).plot()
    lower.figure.savefig(tmp_path / "plot.png")
    labels = [label for label in lower.get_xticklabels() if label.get_text()]
    assert 10 <= len(labels) <= 60
    assert labels[-1].get_text() == "features_159_0"
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))


def test_exact_is_a_tick_of_its_own_and_no_legend_speaks_of_a_floor_that_is_not_there() -> None:
    report = samples.sample()
    bare = replace(report, rows=tuple(replace(row, noise_floor=None) for row in report.rows))
    upper, _ = bare.plot()
    labels = [label.get_text() for label in upper.get_yticklabels()]
    assert labels.count("exact") == 1
    assert labels[-1] == "exact"
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["converted"]


def test_sqnr_stands_beside_its_floor() -> None:
    report = samples.sample()
    upper, _ = report.plot()
    dotted, floors, values = upper.get_lines()
    top = dotted.get_ydata()[0]
    finite = {row.name: row.cumulative.sqnr_db for row in report.rows}
    drawn = dict(zip(finite, values.get_ydata(), strict=True))
    assert drawn == {**finite, "fc.weight": top}
    assert top > max(y for name, y in drawn.items() if name != "fc.weight")
    assert floors.get_ydata()[0] == report.rows[0].noise_floor_db


def test_stacks_add_up_to_the_differing_share() -> None:
    report = samples.sample()
    _, lower = report.plot()
    heights = [0.0] * len(report.rows)
    for container in lower.containers:
        for place, bar in enumerate(container):
            assert bar.get_y() == heights[place]
            heights[place] += bar.get_height()
    for height, row in zip(heights, report.rows, strict=True):
        # reason: bars are stacked one by one, and their heights rounded in double each time
        assert height == pytest.approx(100 * row.differing / row.cumulative.elements)
    legend = [text.get_text() for text in lower.get_legend().get_texts()]
    assert legend == list(report.causes)


def test_given_axes_are_drawn_into() -> None:
    figure, ax = plt.subplots()
    assert samples.sample().plot(ax) is ax
    assert figure.axes == [ax]


@pytest.mark.parametrize("report", [samples.exact_sample(), samples.hostile(), Report(rows=())])
def test_figures_that_are_not_finite_are_no_obstacle(report: Report) -> None:
    upper, lower = report.plot()
    upper.figure.canvas.draw()
    assert lower.get_ylabel() == "differing codes, %"


def test_causes_have_colours_of_their_own() -> None:
    fixed = palette.colours(palette._FIXED)
    names = [*fixed, *map(str, range(len(palette._OTHERS)))]
    assert len(set(palette.colours(names).values())) == len(names)
