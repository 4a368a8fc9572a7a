"""Registries refuse mistakes, and every file of a plug-in folder is registered."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest

import fxqfix
from fxqfix import causes, checks, deviations, dialects, engines, names, ops, passes, routes
from fxqfix.engines._base import kernel
from fxqfix.engines.defects import DEFECTS
from fxqfix.errors import RegistryError, UnknownNameError
from fxqfix.flows.to_int8 import _CHOICES
from fxqfix.passes import Pass, PinRanges, Rewriter
from fxqfix.registry import Registry, plugins
from fxqfix.report.renderings import FORMATS

PACKAGE = Path(fxqfix.__file__).parent


@dataclass(frozen=True)
class Row:
    name: str
    summary: str = "does"


def rows_of(**given: Any) -> Registry[str, Row]:
    return Registry("row", parts=("summary",), **given)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Row("a"), r"x/y\.py, row 'a': this name is taken\. Found: one of x/first\.py"),
        (Row("b", ""), r"x/y\.py, row 'b': it has no summary"),
        (Row("odd"), r"x/y\.py, row 'odd': it is odd"),
    ],
)
def test_a_mistake_is_refused_with_file_and_row(row: Row, said: str) -> None:
    rows = rows_of(check=lambda row: "it is odd" if row.name == "odd" else None)
    rows.add(Row("a"), module="x.first")
    with pytest.raises(RegistryError, match=said):
        rows.add(row, module="x.y")
    assert list(rows) == ["a"]


def test_an_unknown_key_is_refused_with_the_known() -> None:
    rows = rows_of()
    rows.add(Row("a"), Row("b"), module="x")
    assert rows["b"] == Row("b")
    assert rows.get("c") is None
    assert "c" not in rows
    with pytest.raises(UnknownNameError, match=r"there is no row 'c'\. Expected: a, b"):
        rows["c"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "plugged"
    found.mkdir()
    (found / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "plugged"]:
        monkeypatch.delitem(sys.modules, name)
    return found


def test_a_file_is_its_registration(folder: Path) -> None:
    head = "from tests.test_registry import Row\n"
    (folder / "late.py").write_text(f"{head}PLACE = 20\nROW = Row('late')\n")
    (folder / "soon.py").write_text(f"{head}PLACE = 10\nROWS = Row('soon'), Row('then')\n")
    (folder / "_shared.py").write_text("raise ValueError\n")
    (folder / "tool.py").write_text("raise ValueError\n")
    rows = rows_of()
    rows.discover("plugged", "ROW", but=("tool",))
    assert list(rows) == ["soon", "then", "late"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("PLACE = 20\n", r"plugged/new\.py: this file holds no row\. Expected: ROW"),
        ("PLACE = 10\nROW = 1\n", r"plugged/new\.py: this place is taken\. Found: 10, as in plugg"),
    ],
)
def test_a_file_without_its_part_is_refused(folder: Path, text: str, said: str) -> None:
    head = "from tests.test_registry import Row\n"
    (folder / "a.py").write_text(f"{head}PLACE = 10\nROW = Row('a')\n")
    (folder / "new.py").write_text(text)
    with pytest.raises(RegistryError, match=said):
        rows_of().discover("plugged", "ROW")


def test_files_without_a_place_in_a_folder_with_an_order_are_refused(folder: Path) -> None:
    for name, text in (("a", "PLACE = 1"), ("b", "")):
        (folder / f"{name}.py").write_text(text)
    with pytest.raises(RegistryError, match=r"plugged/b\.py: this file has no PLACE"):
        plugins("plugged")


@pytest.mark.parametrize("engine", ["x86", "fbgem"])
def test_a_kernel_of_no_engine_or_op_or_of_one_that_has_it_is_refused(engine: str) -> None:
    known = engines.table()
    with pytest.raises(RegistryError, match=f"there is no engine '{engine}' with kernels"):
        kernel("conv2d", engines=(engine,))(lambda call: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(RegistryError, match="the op table has no row 'conv2dd'"):
        kernel("conv2dd", engines=("fbgemm",))(lambda call: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(RegistryError, match=r"taken\. Found: one of fxqfix/engines/weighted\.py"):
        kernel("conv2d", engines=("fbgemm",))(lambda call: None)  # type: ignore[arg-type,return-value]
    assert engines.table() == known


def test_a_users_pass_does_not_evict_ours() -> None:
    with pytest.raises(RegistryError, match="pass 'pin-ranges': this name is taken"):

        class Mine(Pass):
            """Something else."""

            name: ClassVar[str] = "pin-ranges"

            def rewrite(self, rewriter: Rewriter) -> None:
                """Nothing."""

    assert passes.registry()["pin-ranges"] is PinRanges


def test_a_cell_that_runs_again_takes_its_pass_over() -> None:
    def cell() -> type[Pass]:
        class Again(Pass):
            """Defined anew each time."""

            name: ClassVar[str] = "again-and-again"

            def rewrite(self, rewriter: Rewriter) -> None:
                """Nothing."""

        return Again

    first, second = cell(), cell()
    assert first is not second
    assert passes.registry()["again-and-again"] is second


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"engines": ("x86",)}, "there is no engine 'x86'"),
        ({"ops": ("conv2dd",)}, "the op table has no row 'conv2dd'"),
        ({"cure": "iland"}, "there is no cure 'iland'"),
        ({"effect": ""}, "it has no effect"),
    ],
)
def test_a_defect_with_a_mistake_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RegistryError, match=said):
        engines.defects.TABLE.add(replace(DEFECTS[0], name="new", **changed), module="x")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"family": "weigthed"}, "there is no family 'weigthed'"),
        ({"output": "outer"}, "there is no output 'outer'"),
        ({"values": "near"}, "there is no values 'near'"),
        ({"fixed": (1.0, 0)}, "a fixed output"),
        ({"spelled": (), "spelled_relu": (), "int8": (), "int8_relu": ()}, "it has no spelling"),
    ],
)
def test_an_op_with_a_mistake_is_refused(changed: dict[str, Any], said: str) -> None:
    row = replace(ops.OPS["add"], key="new", **changed)
    with pytest.raises(RegistryError, match=f"x.py, op 'new': {said}"):
        ops.OPS.add(row, module="x")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"deploy": None}, "it can neither deploy nor certify"),
        ({"lapses": ("bias-int23",)}, "there is no lapse 'bias-int23'"),
        ({"summary": ""}, "it has no summary"),
    ],
)
def test_a_route_with_a_mistake_is_refused(changed: dict[str, Any], said: str) -> None:
    row = replace(routes.registry()["export"], name="new", **changed)
    with pytest.raises(RegistryError, match=said):
        routes._registry.ROUTES.add(row, module="x")


# Where each row of a folder was written, and the files that hold none.
FOLDERS: dict[str, tuple[set[str], set[str]]] = {
    "checks": ({row.run.__module__ for row in checks.registry()}, set()),
    "dialects": (
        {row.__name__ for row in dialects.DIALECTS},  # type: ignore[attr-defined]
        {"qconfig", "quantizer", "site", "trace", "weights"},
    ),
    "engines": (
        {row.build.__module__ for row in engines.table().values() if row.build is not None},
        {"calls", "defects", "dispatch", "isa", "listing", "onednn", "saturation"},
    ),
    "passes": ({row.__module__ for row in passes.registry().values()}, set()),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_file_of_a_plugin_folder_is_registered(name: str) -> None:
    rows, others = FOLDERS[name]
    files = {path.stem for path in (PACKAGE / name).glob("[a-z]*.py")}
    assert others < files or not others
    missing = {f"fxqfix.{name}.{stem}" for stem in files - others} - rows
    assert not missing


def test_every_file_with_rows_is_registered() -> None:
    """Rows that do not know their module are looked up in each file."""
    registered: dict[str, list[Any]] = {
        "causes/CAUSE": list(causes.registry()),
        "deviations/DEVIATION": list(deviations.registry().values()),
        "routes/ROUTE": list(routes.registry().values()),
        "report/RENDERING": list(FORMATS.values()),
    }
    for place, known in registered.items():
        name, part = place.split("/")
        found = []
        for path in (PACKAGE / name).glob("[a-z]*.py"):
            module = sys.modules[f"fxqfix.{name}.{path.stem}"]
            own = [*getattr(module, f"{part}S", ()), *filter(None, [getattr(module, part, None)])]
            assert own or name == "report" or path.stem in ("certify", "migrate"), path
            found += own
        assert len(found) == len(known)
        assert all(row in known for row in found)


def test_names_as_types_are_those_that_the_code_knows() -> None:
    assert get_args(names.Engine) == engines.ENGINES
    assert get_args(names.IsaName) == engines.ISAS
    assert get_args(names.Severity) == checks.SEVERITIES
    known = {"saturation": names.Saturation, "averages": names.Averages}
    assert {key: get_args(kind) for key, kind in known.items()} == _CHOICES
