"""The house rules, read off the source: nothing here imports fxqfix.

Each rule is a function from source to a list of problems; the rules are first tried on synthetic
source, then applied to the package, to the tests and to the tracked text files.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import subprocess
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fxqfix"

# Level of each part of the package. A part is a module of the package root or a whole sub-package;
# "" is fxqfix/__init__.py. The demos use the public names and the CLI runs the demos, so the
# programs of L6 have an order of their own.
LEVELS = {
    "errors": -1,
    "_rng": -1,
    "_reasons": -1,
    "_notebook": -1,
    **dict.fromkeys(("_devices", "registry", "names"), -0.5),
    **dict.fromkeys(("qparams", "_torch", "_extras"), 0),
    **dict.fromkeys(("_pt2e", "_observers", "_inductor"), 0.2),  # resolve names through _torch
    "_regrid": 0.1,  # of the grids of qparams
    "_settings": 0.1,  # sets flags through _torch
    "inserted": 0.3,  # what the table lists and the passes insert
    "ops": 0.5,  # the readers of L1 look nodes up in the table
    "dialects": 1,
    "pairing": 1.5,  # needs the readers only, and the passes need it
    "engines": 1.7,  # need the readers only, and the pass emulate-engine needs them
    "passes": 2,
    "export": 2.5,  # records and files of what the engines compute with
    "evidence": 2.8,  # what a cause sees and gives back
    **dict.fromkeys(("measure", "causes", "checks", "deviations"), 3),
    "report": 4,
    "comparison": 4.5,
    **dict.fromkeys(("api", "flows"), 5),
    "testing": 5.7,  # asks the routes
    "routes": 5.5,  # one of them is to_int8 and compare
    "": 6,
    **dict.fromkeys(("demos", "callbacks"), 6.1),
    "cli": 6.2,
    "__main__": 6.3,
}
UNLISTED_LEVEL = 5

# Which parts may import a library that only some need.
RESTRICTED = {
    "tabulate": {"report"},
    "matplotlib": {"report"},
    "networkx": {"report", "pairing", "dialects", "passes"},
}

TORCH_PRIVATE_HOME = f"{PACKAGE}._torch"

MAX_FUNCTION_LINES = 60
MAX_MODULE_LINES = 400
# Modules that may be longer, each with its reason.
LONG_MODULES = {
    f"{PACKAGE}.ops": "the table of ops, a row per family",
    f"{PACKAGE}.engines.defects": "the table of known-wrong kernels",
}

# Hosts that a document or a generated file may name.
PUBLIC_HOSTS = {
    "github.com",
    "docs.pytorch.org",
    "keepachangelog.com",
    "semver.org",
    "www.w3.org",  # XML namespaces of SVG and HTML
}


@dataclass(frozen=True)
class Module:
    """The source of a module and its dotted name."""

    name: str
    source: str
    is_package: bool = False

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def part(self) -> str:
        return part_of(self.name)

    @property
    def package(self) -> str:
        return self.name if self.is_package else self.name.rpartition(".")[0]


def part_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def level_of(name: str) -> float:
    return LEVELS.get(part_of(name), UNLISTED_LEVEL)


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


# --- rules ---------------------------------------------------------------------------------------


def imports(module: Module) -> Iterator[tuple[int, str, str]]:
    """Yield (line, module, name) of every import, wherever it stands; name is "" for a module.

    Calls with a literal count as well: import_module, __import__ and fxqfix._extras.require.
    """
    for node in ast.walk(module.tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name, ""
            case ast.ImportFrom(module=base, names=names, level=level):
                absolute = resolve_name("." * level + (base or ""), module.package)
                for alias in names:
                    yield node.lineno, absolute, alias.name
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__" | "require")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(base)), *_],
            ):
                yield node.lineno, resolve_name(base, module.package), ""


def upward_imports(module: Module, known: set[str]) -> list[str]:
    """Imports of a part that isn't below the module's own part."""
    problems = []
    for line, base, name in imports(module):
        if base.split(".")[0] != PACKAGE:
            continue
        target = f"{base}.{name}" if f"{base}.{name}" in known else base
        if part_of(target) != module.part and level_of(target) >= level_of(module.name):
            problems.append(
                f"{module.name}:{line} (L{level_of(module.name)}) "
                f"imports {target} (L{level_of(target)})"
            )
    return problems


def restricted_imports(module: Module) -> list[str]:
    """Imports of a library that the module's part may not use."""
    return [
        f"{module.name}:{line} imports {base}; only {sorted(RESTRICTED[library])} may"
        for line, base, _ in imports(module)
        if (library := base.split(".")[0]) in RESTRICTED and module.part not in RESTRICTED[library]
    ]


def torch_names(module: Module) -> set[str]:
    """Names that the module binds to torch, to its modules or to their members."""
    bound = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    bound.add(alias.asname or "torch")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            bound.update(alias.asname or alias.name for alias in node.names if not node.level)
    return bound


def dotted(node: ast.expr) -> list[str]:
    """Return ["a", "b", "c"] for the expression a.b.c, [] for anything else than such a chain."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return [*head, node.attr]
    return []


def torch_private(module: Module) -> list[str]:
    """Private names of torch: imported, reached by attribute, by getattr or `resolve` of a text."""
    if module.name == TORCH_PRIVATE_HOME:
        return []
    problems = []
    for line, base, name in imports(module):
        path = [*base.split("."), name]
        if path[0] == "torch" and any(map(is_private, path)):
            problems.append(f"{module.name}:{line} imports {'.'.join(filter(None, path))}")
    bound = torch_names(module)
    for node in ast.walk(module.tree):
        match node:
            case ast.Attribute():
                path = dotted(node)
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"),
                args=[owner, ast.Constant(value=str(name)), *_],
            ):
                path = [*dotted(owner), name]
            case ast.Call(
                func=ast.Attribute(attr="resolve"), args=[ast.Constant(value=str(name)), *_]
            ) if name.startswith("torch.") and any(map(is_private, name.split("."))):
                problems.append(f"{module.name}:{node.lineno} resolves {name}")
                continue
            case _:
                continue
        if len(path) > 1 and path[0] in bound and is_private(path[-1]):
            problems.append(f"{module.name}:{node.lineno} uses {'.'.join(path)}")
    return problems


def too_long(module: Module) -> list[str]:
    """Functions and modules with more lines than the house allows."""
    problems = []
    lines = len(module.source.splitlines())
    if lines > MAX_MODULE_LINES and module.name not in LONG_MODULES:
        problems.append(f"{module.name} has {lines} lines")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                problems.append(f"{module.name}:{node.lineno} {node.name} has {lines} lines")
    return problems


def unexplained_tolerances(module: Module) -> list[str]:
    """Uses of allclose or approx with no comment that holds `reason`, there or the line before."""
    reasons = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(module.source).readline)
        if token.type == tokenize.COMMENT and "reason" in token.string
    }
    problems = []
    for node in ast.walk(module.tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) if (
                "allclose" in name or name == "approx"
            ):
                line = node.end_lineno or node.lineno
                if not reasons & {line, line - 1}:
                    problems.append(f"{module.name}:{line} {name} without a reason")
    return problems


DIALECTS = ("pt2e-prepared", "fx-prepared", "fx-reference", "fx-int8", "decomposed")


def named_dialects(module: Module) -> list[str]:
    """Tests for a dialect by its name outside of the dialects: a reading has the answers."""
    if module.part == "dialects":
        return []
    problems = [
        f"{module.name}:{line} imports the name of {base}"
        for line, base, name in imports(module)
        if base.startswith(f"{PACKAGE}.dialects") and name == "NAME"
    ]
    for node in ast.walk(module.tree):
        match node:
            case ast.Attribute(value=ast.Name(), attr="NAME"):
                problems.append(f"{module.name}:{node.lineno} uses {ast.unparse(node)}")
            case ast.Compare(left=left, comparators=others):
                asked = [n for n in (left, *others) if isinstance(n, ast.Attribute)]
                texts = [n.value for n in (left, *others) if isinstance(n, ast.Constant)]
                if any(n.attr == "dialect" for n in asked) or any(t in DIALECTS for t in texts):
                    problems.append(f"{module.name}:{node.lineno} asks {ast.unparse(node)}")
    return problems


# A path of one machine, but not the tail of a relative path such as docs/work/x.
MACHINE_PATH = re.compile(r"(?<![\w.~*/-])/(?:work|tmp|root|home|Users)/")
URL = re.compile(r"\b(?:https?|file|ssh|git)://[^\s<>\"'`)\]]+")
IP_ADDRESS = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")


def machine_traces(text: str) -> list[str]:
    """Absolute machine paths, addresses and hosts that aren't public documentation."""
    urls = [url for url in URL.findall(text) if urlsplit(url).hostname not in PUBLIC_HOSTS]
    # Inside a URL such a path is the site's own.
    rest = URL.sub("", text)
    return [*urls, *MACHINE_PATH.findall(rest), *IP_ADDRESS.findall(rest)]


# --- the rules can fail --------------------------------------------------------------------------

KNOWN = {PACKAGE} | {
    f"{PACKAGE}.{name}"
    for name in (
        "errors",
        "qparams",
        "ops",
        "passes",
        "passes._base",
        "passes.x",
        "engines",
        "measure",
        "cli",
    )
}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("qparams", "from fxqfix.ops import OpSpec"),
        ("qparams", "import fxqfix._torch"),
        ("ops", "from fxqfix import dialects"),
        ("ops", "from . import passes"),
        ("ops", "from .passes._base import Pass"),
        ("ops", "def f():\n    import fxqfix.engines"),
        ("ops", "if TYPE_CHECKING:\n    from fxqfix.passes import x"),
        ("ops", "importlib.import_module('fxqfix.passes.x')"),
        ("ops", "import_module('.passes', __package__)"),
        ("engines.x", "from fxqfix import passes"),
        ("engines.x", "from ..passes import _base"),
        ("causes.x", "from fxqfix.report import Row"),
        ("api", "from fxqfix.flows import migrate"),
        ("unlisted", "from fxqfix.api import compare"),
        ("api", "from fxqfix import compare"),
        ("demos.x", "from fxqfix.cli import main"),
    ],
)
def test_upward_import_is_found(name: str, source: str) -> None:
    assert len(upward_imports(Module(f"{PACKAGE}.{name}", source), KNOWN)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("qparams", "from fxqfix.errors import NonFiniteError"),
        ("_torch", "from fxqfix import errors"),
        ("passes.x", "from fxqfix.passes._base import Pass"),
        ("passes.x", "from . import _base"),
        ("passes.x", "from fxqfix import ops, qparams"),
        ("unlisted", "from fxqfix.report import Report"),
        ("demos.x", "from fxqfix import compare"),
        ("cli", "from fxqfix.demos import x"),
        ("ops", "import fxqfixture, torch.fx.passes"),
    ],
)
def test_downward_import_is_allowed(name: str, source: str) -> None:
    assert upward_imports(Module(f"{PACKAGE}.{name}", source), KNOWN) == []


def test_relative_import_in_a_package_starts_at_the_package() -> None:
    inside = Module(f"{PACKAGE}.passes", "from . import _base", is_package=True)
    outside = Module(f"{PACKAGE}.passes", "from .. import measure", is_package=True)
    assert upward_imports(inside, KNOWN) == []
    assert len(upward_imports(outside, KNOWN)) == 1


@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        ("api", "from tabulate import tabulate", 1),
        ("passes.x", "if TYPE_CHECKING:\n    import matplotlib.pyplot as plt", 1),
        ("causes.x", "def f():\n    import networkx", 1),
        ("api", "require('matplotlib.pyplot', 'plot', 'Report.plot')", 1),
        ("report.text", "import tabulate, matplotlib, networkx", 0),
        ("pairing", "import networkx as nx", 0),
    ],
)
def test_restricted_import_is_found(name: str, source: str, count: int) -> None:
    assert len(restricted_imports(Module(f"{PACKAGE}.{name}", source))) == count


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import torch._dynamo", 1),
        ("from torch._inductor import config", 1),
        ("from torch.ao.quantization.fx._equalize import f", 1),
        ("from torch.fx.graph import _PyTreeInfo", 1),
        ("import torch\ntorch._C.f()", 1),
        ("import torch\ntorch.ao.quantization._f(x)", 1),
        ("import torch as t\nt._C", 1),
        ("import torch.ao.quantization as q\nq._f", 1),
        ("from torch import fx, nn as n\nfx._f\nn._f", 2),
        ("import torch\ngetattr(torch.nn, '_f')", 1),
        ("importlib.import_module('torch._dynamo')", 1),
        ("import torch\ntorch.__version__", 0),
        ("import torch\nself._x = torch.fx.Graph()", 0),
        ("import torchao\nfrom fxqfix._torch import kernels\n_x = y._z", 0),
    ],
)
def test_torch_private_name_is_found(source: str, count: int) -> None:
    assert len(torch_private(Module(f"{PACKAGE}.api", source))) == count
    assert torch_private(Module(TORCH_PRIVATE_HOME, source)) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from fxqfix.dialects.int8 import NAME", 1),
        ("from fxqfix.dialects import int8\nif x == int8.NAME: pass", 1),
        ("if reading.dialect == y: pass", 1),
        ("if found in (a, b) or 'fx-int8' == found: pass", 1),
        ("f(reading.dialect, 'fx-int8')", 0),
        ("from fxqfix.dialects.int8 import read\nx.has_kernels", 0),
    ],
)
def test_a_dialect_asked_by_name_is_found(source: str, count: int) -> None:
    assert len(named_dialects(Module(f"{PACKAGE}.flows.x", source))) == count
    assert named_dialects(Module(f"{PACKAGE}.dialects.x", source)) == []


def test_long_function_and_module_are_found() -> None:
    for lines, count in ((MAX_FUNCTION_LINES, 0), (MAX_FUNCTION_LINES + 1, 1)):
        source = "class C:\n    async def f(self):" + "\n        x = 1" * (lines - 1)
        assert len(too_long(Module(f"{PACKAGE}.api", source))) == count
    for lines, count in ((MAX_MODULE_LINES, 0), (MAX_MODULE_LINES + 1, 1)):
        assert len(too_long(Module(f"{PACKAGE}.api", "x = 1\n" * lines))) == count
        assert too_long(Module(f"{PACKAGE}.ops", "x = 1\n" * lines)) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("assert torch.allclose(a, b)", 1),
        ("assert a == pytest.approx(b)", 1),
        ("# reason: too far away\n\nassert a.allclose(b)", 1),
        ("np.testing.assert_allclose(a, 'reason')", 1),
        ("# reason: other summation order\nassert torch.allclose(a, b)", 0),
        ("assert torch.allclose(  # reason: other summation order\n    a, b\n)", 0),
        ("from numpy.testing import assert_allclose", 0),
    ],
)
def test_unexplained_tolerance_is_found(source: str, count: int) -> None:
    assert len(unexplained_tolerances(Module("tests.x", source))) == count


@pytest.mark.parametrize("folder", ["work", "tmp", "root", "home"])
def test_machine_path_is_found(folder: str) -> None:
    path = "/".join(["", folder, "x"])
    assert len(machine_traces(f'open("{path}")')) == 1
    assert machine_traces(f"docs{path} and https://github.com/x{path}") == []


def test_host_is_found() -> None:
    assert len(machine_traces("see " + "https:" + "//build-7.example/x")) == 1
    assert len(machine_traces("at " + ".".join(["10", "0", "0", "7"]))) == 1
    assert machine_traces("version 0.10.0.20261006, torch 2.13.0") == []


# --- the rules hold ------------------------------------------------------------------------------


def modules(folder: str) -> list[Module]:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found.append(Module(name, path.read_text(encoding="utf-8"), is_package))
    return found


def text_files() -> Iterator[tuple[str, str]]:
    """Yield path and text of the files that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        try:
            yield name, path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # binary, or deleted but not yet staged
            continue


@pytest.mark.parametrize("rule", [restricted_imports, torch_private, too_long, named_dialects])
def test_package_keeps_the_rule(rule: Callable[[Module], list[str]]) -> None:
    problems = [problem for module in modules(PACKAGE) for problem in rule(module)]
    assert not problems, "\n".join(problems)


def test_imports_point_downwards() -> None:
    package = modules(PACKAGE)
    known = {module.name for module in package}
    problems = [problem for module in package for problem in upward_imports(module, known)]
    assert not problems, "\n".join(problems)


def test_tolerances_in_tests_have_reasons() -> None:
    problems = [p for module in modules("tests") for p in unexplained_tolerances(module)]
    assert not problems, "\n".join(problems)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a release has no list of tracked files")
def test_tracked_files_hold_no_trace_of_a_machine() -> None:
    problems = [f"{name}: {t}" for name, text in text_files() for t in machine_traces(text)]
    assert not problems, "\n".join(problems)
