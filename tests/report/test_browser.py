"""The page of a report in a real headless Chromium."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fxqfix.measure import Histogram
from fxqfix.report import Report, Row, html
from tests.report import samples
from tests.report.browser import MISSING, Browser, browser

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

WIDTHS = (390, 768, 1280, 1600)


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(autouse=True)
def silent_console(window: Browser) -> Iterator[None]:
    yield
    assert window.log() == []


def filled(report: Report) -> Report:
    """The report with the codes of every row, and modules to fold."""
    counts = Histogram(0, tuple(range(128)) + (0,) * 128, tuple(range(256)))

    def more(i: int, row: Row) -> Row:
        module = f"stage{i // 10}.block{i // 5}.conv" if row.kind == "activation" else row.module
        return replace(
            row,
            histogram=counts,
            module=module,
            source=f"net.py:{i} in forward: y = self.conv(x)",
            evidence={cause: f"the evidence of {cause} at {row.name}" for cause in row.causes},
        )

    return replace(report, rows=tuple(more(i, row) for i, row in enumerate(report.rows)))


def shown(window: Browser) -> list[str]:
    """Names of the rows that can be seen, from the top."""
    names: list[str] = window.run(
        "return [...document.querySelectorAll('#sites tbody tr[data-row]')]"
        ".filter(r => !r.hidden).map(r => r.querySelector('button').textContent)"
    )
    return names


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    filled(samples.many(30)).to_html(path)
    return path


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_all_fits_and_reads(window: Browser, page: Path, width: int, theme: str) -> None:
    window.open(page, width, theme=theme)
    wide = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    full, seen = window.run(wide)
    assert full <= seen  # nothing runs off the page
    right = window.run(
        "return Math.max(...[...document.querySelectorAll('#sites td.causes')]"
        ".filter(c => c.offsetParent).map(c => c.getBoundingClientRect().right))"
    )
    assert 0 < right <= width  # the causes are in sight
    window.click("#sites tbody tr[data-row] button")
    full, seen = window.run(wide)
    assert full <= seen
    ratio = window.run(
        """
        const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(x => {
            const v = x / 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
            return .2126 * r + .7152 * g + .0722 * b; };
        const back = light(getComputedStyle(document.body).backgroundColor);
        return ['body', '.small', '.headline', '.verdict', '#sites td.name button', '.parts p']
          .map(s => light(getComputedStyle(document.querySelector(s)).color))
          .map(l => (Math.max(l, back) + .05) / (Math.min(l, back) + .05));
        """
    )
    assert min(ratio) >= 4.5  # WCAG AA
    dark = window.run("return getComputedStyle(document.body).backgroundColor") != (
        "rgb(255, 255, 255)"
    )
    assert dark == (theme == "dark")
    window.run("document.getElementById('theme').click()")
    assert dark != (
        window.run("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    )


def test_the_worst_come_first_and_heads_sort(window: Browser, page: Path) -> None:
    window.open(page)
    assert shown(window)[:2] == ["features_29_0", "features_28_0"]
    assert "features_0_0" not in shown(window)  # equal: folded away
    head = "#sites th[data-sort=local] button"
    assert window.run("return document.querySelector('th[data-sort=local]').ariaSort") == (
        "descending"
    )
    window.click(head)
    assert shown(window)[0] == "features_1_0"
    assert window.run("return document.querySelector('th[data-sort=local]').ariaSort") == (
        "ascending"
    )
    window.click("#sites th[data-sort=name] button")
    assert shown(window) == sorted(shown(window))
    window.run("const s = document.getElementById('by'); s.value = 'order';"
               "s.dispatchEvent(new Event('change'))")  # fmt: skip
    assert shown(window) == [f"features_{i}_0" for i in range(1, 30)]


def test_filters(window: Browser, page: Path) -> None:
    window.open(page)
    window.type("#search", "features_2")
    assert len(shown(window)) == 11
    assert window.run("return document.getElementById('count').textContent") == (
        "11 of 30 rows shown"
    )
    window.open(page)
    window.click("[data-cause=rounding]")
    assert len(shown(window)) == 26  # i // 4 codes
    assert window.run("return document.getElementById('which').value") == "rounding"
    window.click("[data-cause=rounding]")
    window.click("#equal")
    assert len(shown(window)) == 30


def test_a_node_opens_its_row_and_modules_fold(window: Browser, page: Path) -> None:
    window.open(page)
    window.click(".node[data-key='3']")
    assert window.run("return document.querySelector('tr.open button').textContent") == (
        "features_3_0"
    )
    said = window.run("return document.querySelector('tr.detail').innerText")
    for text in (
        "range-lost",
        "the evidence of range-lost at features_3_0",
        "fxqfix.to_int8(prepared, engine='fbgemm')",
        "net.py:3 in forward: y = self.conv(x)",
        "3 of 4,096",
        "[0, 127] quint8",
    ):
        assert text in said, text
    count = "return document.querySelectorAll('.node').length"
    assert window.run(count) == 30
    window.click("[data-group=stage1] text")
    assert window.run(count) == 21
    window.click("#fold")
    assert window.run(count) == 3
    window.click(".node.folded")
    assert window.run(count) == 4  # two blocks inside
    window.click("#unfold")
    assert window.run(count) == 30
    assert window.run("return document.querySelectorAll('.edge.hot').length") == 0  # no output
    for key in ("cumulative", "cause", "local"):
        window.run("const s = document.getElementById('colour'); s.value = arguments[0];"
                   "s.dispatchEvent(new Event('change'))", key)  # fmt: skip
        assert window.run("return document.querySelectorAll('.tint').length") >= 29


def test_keyboard_and_screen_reader(window: Browser, page: Path) -> None:
    window.open(page)
    press = (
        "const n = document.querySelector(arguments[0]); n.focus(); n.dispatchEvent("
        "new KeyboardEvent('keydown', {key: arguments[1], bubbles: true}));"
        "return document.activeElement.getAttribute('aria-label') || ''"
    )
    assert window.run(press, ".node[data-key='3']", "ArrowDown").startswith("features_4_0, conv2d")
    assert window.run(press, ".node[data-key='3']", "ArrowUp").startswith("features_2_0, conv2d")
    window.run(press, ".node[data-key='3']", "Enter")
    assert window.run("return document.activeElement.textContent") == "features_3_0"
    unnamed = window.run(
        "return [...document.querySelectorAll('button, select, input, [role=button], [role=img]')]"
        ".filter(e => !(e.ariaLabel || e.textContent.trim() || e.closest('label'))).length"
    )
    assert unnamed == 0


def test_an_opened_row_says_what_quantization_costs(window: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    first, *rest = samples.sample().rows
    beside = replace(first, quantization=samples.apart(100, 1))
    replace(samples.sample(), rows=(beside, *rest)).to_html(path)
    window.open(path)
    for index, wanted in ((0, True), (1, False)):
        window.click(f"#row-{index} button")
        said = window.run(f"return document.querySelector('#row-{index} + .detail').innerText")
        assert ("quantization itself: SQNR 56.1 dB against the float model" in said) == wanted


def test_the_way_of_the_error_is_marked(window: Browser, tmp_path: Path) -> None:
    report = samples.many(5)
    end = samples.output(samples.apart(10, 4), "features_4_0")
    path = tmp_path / "report.html"
    replace(report, rows=(*report.rows, end)).to_html(path)
    window.open(path)
    assert window.run("return document.querySelectorAll('.edge.hot').length") == 4


def test_hostile_names_run_nothing(window: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    samples.hostile().to_html(path)
    window.open(path)
    window.click("#sites tbody tr[data-row] button")
    assert window.run("return document.scripts.length") == 2
    name = window.run("return document.querySelector('#sites button').textContent")
    assert "<script>" in shown(window)[0]
    assert name


def test_pages_without_rows_and_of_two_reports(window: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    Report(rows=()).to_html(path)
    window.open(path)
    path.write_text(html.render(samples.exact_sample()), encoding="utf-8")
    window.open(path)
    assert len(shown(window)) == 3  # where all is equal, nothing is folded away
    path.write_text(html.render(samples.sample(), samples.sample()), encoding="utf-8")
    window.open(path)
    window.click("#sites tbody tr[data-row] button")
    assert "before → after" in window.run("return document.querySelector('.detail').innerText")


def test_prints_without_tools(window: Browser, page: Path) -> None:
    window.open(page)
    window.devtools("Emulation.setEmulatedMedia", media="print")
    assert window.run("return [...document.querySelectorAll('.tools')].every(t => !t.offsetParent)")
    assert window.run("return document.querySelector('#sites').offsetHeight") > 500


def painted(window: Browser, path: Path) -> float:
    """Milliseconds from the start to the first paint."""
    window.open(path)
    for _ in range(200):
        found: list[float] = window.run(
            "return performance.getEntriesByName('first-contentful-paint').map(e => e.startTime)"
        )
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError("nothing was painted")


def test_500_nodes(window: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    filled(samples.many(500)).to_html(path)
    assert path.stat().st_size <= 3 * 2**20
    # Other processes run beside it: what an empty report takes is the machine's and not the page's.
    empty = tmp_path / "empty.html"
    Report(rows=()).to_html(empty)
    idle, paint = (min(painted(window, p) for _ in range(5)) for p in (empty, path))
    assert paint - idle < 1000, f"first paint after {paint:.0f} ms, of an empty page {idle:.0f} ms"
