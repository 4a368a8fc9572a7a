"""The documentation says what is so: generated pages, executed blocks, links, named tests."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fxqfix
from fxqfix import passes

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def load(name: str, folder: Path = DOCS) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


blocks, generate = load("blocks"), load("generate")
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
EXECUTED = [page for page in PAGES if "```python\n" in page.read_text(encoding="utf-8")]
# What a page's blocks need, by the words that say so.
EXTRAS = {
    "onnxruntime": ("onnxruntime",),
    "tensorboard": ("tensorboard",),
    "torchao.testing.pt2e._xnnpack_quantizer": ("torchao", "lowered"),
}
COMMAND = "run `python docs/generate.py` and look at the difference"


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- what the checks themselves do ----------------------------------------------------------------


def test_blocks_are_found_with_their_output() -> None:
    text = "a\n```python\nx = 1\n```\nb\n```python\nprint(x)\n```\n\n```text\n1\n```\n"
    first, second = blocks.blocks(text)
    assert (first.code, first.output) == ("x = 1\n", None)
    assert (second.code, second.output) == ("print(x)\n", "1\n")


def test_rendering_puts_the_output_under_its_block(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 3\n```\n\n```python\nprint(x)\n```\n\n```text\nold\n```\nend\n")
    rendered = blocks.render(page)
    assert rendered == "```python\nx = 3\n```\n\n```python\nprint(x)\n```\n\n```text\n3\n```\nend\n"
    page.write_text(rendered)
    assert blocks.render(page) == rendered


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("conv 1000 codes", "conv  1003 codes", True),
        ("conv 1000 codes", "conv 1200 codes", False),
        ("conv 1000 codes", "fc 1000 codes", False),
        ("---  ----", "----  ---", True),
        ("sqnr 31.2", "sqnr 31.9", True),
        ("range [0,127]", "range [0,255]", False),
        ("exact: True", "exact: False", False),
        ("fbgemm, torch 2.13.0+cpu: ok", "fbgemm, torch 2.6.0: ok", True),
        ("31.2 (floor exact)", "31.2 (floor 74.1)", True),
        ("0.1398/43", "0.139799595/43 -> 0.13979958/43", True),
        ("0.1398/43", "0.0699/0 -> 0.1398/43", False),
        ("exact", "74.1", False),
        ("scale-formula 3", "scale-formula 3, rounding 1", False),
    ],
)
def test_outputs_are_alike(a: str, b: str, same: bool) -> None:
    assert blocks.alike(a, b) == same


# --- the documentation ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", generate.REFERENCE)
def test_reference_page_is_up_to_date(name: str) -> None:
    written = (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")
    assert written == generate.reference(name), COMMAND


def test_the_cost_of_compare_is_that_of_its_figures() -> None:
    overhead = load("overhead_page", ROOT / "benchmarks")
    columns = json.loads(overhead.COUNTS.read_text(encoding="utf-8"))
    assert overhead.page(columns) in overhead.PAGE.read_text(encoding="utf-8")


def test_the_table_of_exactness_is_that_of_its_counts() -> None:
    exactness = load("exactness", ROOT / "benchmarks")
    levels = json.loads(exactness.COUNTS.read_text(encoding="utf-8"))
    assert exactness.page(levels) in exactness.PAGE.read_text(encoding="utf-8")
    wrong = [
        (level, op, engine)
        for level, counts in levels.items()
        for op, engines in counts["ops"].items()
        for engine, (differing, compared) in engines.items()
        if differing or not compared
    ]
    assert wrong == []


def test_every_executed_page_is_written_by_the_generator() -> None:
    assert sorted(EXECUTED) == sorted(generate.PAGES)


@pytest.mark.usefixtures("onnx_functions")
@pytest.mark.parametrize("page", EXECUTED, ids=relative)
def test_blocks_print_what_the_page_says(page: Path) -> None:
    found = list(blocks.blocks(page.read_text(encoding="utf-8")))
    code = "".join(block.code for block in found)
    for extra, words in EXTRAS.items():
        if any(word in code for word in words):
            pytest.importorskip(extra, exc_type=ImportError)
    for block, printed in zip(found, blocks.run(page, found), strict=True):
        place = f"{relative(page)}:{block.line}"
        assert blocks.alike(block.output or "", printed), f"{place}: {COMMAND}\n{printed}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{relative(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{relative(page)}: {link}"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r":\s*(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_named_tests_exist(page: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8"))
    for path, function in named:
        source = ROOT / path
        assert source.exists(), f"{relative(page)}: {path}"
        assert not function or f"def {function}(" in source.read_text(encoding="utf-8"), function


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_named_scripts_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:examples|benchmarks|docs)/[\w/]+\.py)", page.read_text(encoding="utf-8")
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_imported_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for names in re.findall(r"^from fxqfix import (.+)$", text, flags=re.MULTILINE):
        assert {n.strip() for n in names.split(",")} <= set(fxqfix.__all__)
    for name in re.findall(r"`fxqfix\.passes\.(\w+)`", text):
        assert name in passes.__all__


PACKAGES = sorted(p.parent.relative_to(ROOT).as_posix() for p in ROOT.glob("fxqfix/**/__init__.py"))


@pytest.mark.parametrize("path", PACKAGES)
def test_every_exported_name_exists(path: str) -> None:
    package = importlib.import_module(path.replace("/", "."))
    names = getattr(package, "__all__", [])
    assert [name for name in names if not hasattr(package, name)] == []
    assert len(set(names)) == len(names)
