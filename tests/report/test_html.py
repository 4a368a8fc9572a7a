from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from fxqfix.report import Report, html
from tests.report import samples

VOID = {"meta", "br"}


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
        assert {name for name, _ in attrs} <= {"class", "lang", "charset", "name", "content"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize(
    "report",
    [samples.sample(), samples.exact_sample(), samples.hostile(), samples.many(60), Report(())],
)
def test_page_is_sound_and_needs_nothing_else(report: Report) -> None:
    page = report.to_html()
    assert page.startswith("<!DOCTYPE html>")
    found = Page(page)
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert "://" not in page


def test_hostile_names_stay_text() -> None:
    report = samples.hostile()
    found = Page(report.to_html())
    assert found.text.count(report.rows[0].name) >= 4


def test_page_shows_sites_causes_evidence_and_coverage(tmp_path: Path) -> None:
    report = samples.sample()
    found = Page(report.to_html(tmp_path / "report.html"))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.to_html()
    for text in (
        "not ok, differs in 4 of 5 rows, 2 sites left out",
        "stale-qparams: 13 codes",
        "[0,127] -> [0,255]",
        "range-lost 56, upstream 38, rounding 1",
        "1 code sits on a tie",
        "5 sites paired: by dataflow 1, by name 4",
        "no converted site has its inputs",
        "observers were held still",
    ):
        assert text in found.text, text


def test_rows_are_marked_by_where_the_error_was_born() -> None:
    page = samples.sample().to_html()
    states = [page.count(f'<tr class="{state}">') for state in ("differs", "inherits", "equal")]
    assert states == [3, 1, 1]


def test_inspection_page() -> None:
    found = Page(html.render_inspection(samples.inspection()))
    for text in ("conv1.weight", "36 -> 9", "uncalibrated", "no row of the op table"):
        assert text in found.text
