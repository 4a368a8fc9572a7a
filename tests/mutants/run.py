"""Tests of a mutant, in a process forked from one that has imported torch and not fxqfix.

A finder gives the child the changed module, so that no file changes. A first run, of the code as it
is, says for each statement of the modules which tests run it and how long a test takes.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

__all__ = ["Profile", "forked", "noticed_by", "profiled", "warm_up"]

ROOT = Path(__file__).resolve().parents[2]
_HIT = "__mutants_hit__"
# What the tests import, or torch at its first call; a package that is missing is left out.
_WARM = (
    "hypothesis", "torch.ao.quantization.quantize_fx", "torch.export", "torch.onnx",
    "torchao.quantization.pt2e.quantize_pt2e", "onnxruntime", "onnxscript", "pandas", "networkx",
    "torch.onnx._internal.exporter._registration", "matplotlib.pyplot",
    "torch.utils.tensorboard", "torch._inductor.compile_fx",
    "executorch.exir", "executorch.runtime",
    "executorch.backends.xnnpack.partition.xnnpack_partitioner",
)  # fmt: skip


def warm_up() -> None:
    """Import what takes long and is not of this repository."""
    # CI: hypothesis draws the same each time. Of plugins only the one that settings ask for.
    os.environ |= {"CI": "1", "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    # executorch looks for flatc there.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)  # imports torch._dynamo
    for name in _WARM:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy all of that memory
    assert not any(name.partition(".")[0] == "fxqfix" for name in sys.modules)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules of the package and gives them other code."""

    def __init__(self, changes: Mapping[str, Callable[[str, str], CodeType]]) -> None:
        self._changes = changes  # module -> from its file and its source to its code

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        change = self._changes.get(name)
        if change is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.origin is not None
        file, source = spec.origin, Path(spec.origin).read_text(encoding="utf-8")
        loader: Any = spec.loader
        loader.get_code = lambda _: change(file, source)
        return spec


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class _Probed(ast.NodeTransformer):
    """Each statement of a function says that it is due."""

    def __init__(self, path: str) -> None:
        self._path = path

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.Module | ast.ClassDef):
            return node
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                setattr(node, name, [s for one in body for s in self._with_probe(one)])
        return node

    def _with_probe(self, statement: ast.stmt) -> Iterator[ast.stmt]:
        if not _is_docstring(statement):
            call = f"{_HIT}({f'{self._path}:{statement.lineno}'!r})"
            yield ast.copy_location(ast.parse(call).body[0], statement)
        yield statement


def _is_docstring(statement: ast.AST) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _statement(path: str, line: int) -> str | None:
    """The innermost statement of a function that holds a line; None outside of functions."""
    found = None
    queue: list[tuple[ast.AST, bool]] = [(ast.parse((ROOT / path).read_text("utf-8")), False)]
    for node, inside in queue:
        for child in ast.iter_child_nodes(node):
            ends = getattr(child, "end_lineno", None)
            if ends is not None and not child.lineno <= line <= ends:
                continue
            if inside and isinstance(child, ast.stmt):
                found = f"{path}:{child.lineno}"
            queue.append((child, inside or isinstance(child, ast.FunctionDef)))
    return found


@dataclass(frozen=True)
class Profile:
    """What the tests of a folder run.

    Attributes:
        seconds: Test -> CPU seconds that it takes.
        tests: Statement -> tests that run it.
        failed: Tests that fail with the code as it is; no mutant is judged by them.
    """

    seconds: Mapping[str, float]
    tests: Mapping[str, Sequence[str]]
    failed: Sequence[str] = ()

    def order(self, path: str, line: int, limit: float) -> list[str]:
        """Tests for a mutant: those that run its statement, then their neighbours; fast ones first.

        Outside of functions, where a line runs on import: all tests that run some of the module.

        Args:
            path: The module's file.
            line: The line, from 1.
            limit: CPU seconds; the first of them is taken however long it takes.
        """
        at = _statement(path, line)
        of_module = {t for key, ts in self.tests.items() if key.startswith(f"{path}:") for t in ts}
        first = set(self.tests.get(at, ())) if at else of_module
        # What a cached maker or a fixture gave is read by other tests than the one that made it.
        files = {_file(test) for test in first}
        rest = {test for test in self.seconds if _file(test) in files} - first
        chosen, total = list[str](), 0.0
        for group in (first, rest):
            for test in sorted(group - {*self.failed}, key=lambda t: (self.seconds[t], t)):
                total += self.seconds[test]
                if not chosen or total <= limit:
                    chosen.append(test)
        return chosen


def _file(test: str) -> str:
    return test.partition("::")[0]


def forked(work: Callable[[], Any], limit: float) -> Any:
    """What some work gives in a child process; None where that ends before, or takes too long.

    Args:
        work: Its result has to be JSON.
        limit: CPU seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        if not (child := os.fork()):
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 5))
            for number in (1, 2):
                os.dup2(os.open(Path(folder) / "out", os.O_WRONLY | os.O_CREAT), number)
            try:
                result.write_text(json.dumps(work()), encoding="utf-8")
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        if log := os.environ.get("MUTANTS_LOG"):
            shutil.copy(Path(folder) / "out", log)
        return json.loads(result.read_text(encoding="utf-8")) if result.exists() else None


class _Recorder:
    """A plugin of pytest: what each test runs and takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tests: dict[str, list[str]] = {}
        self.failed: list[str] = []
        self._now: set[str] = set()

    def hit(self, key: str) -> None:
        self._now.add(key)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._now.clear()
        start = sum(os.times()[:4])
        result = yield
        self.seconds[item.nodeid] = sum(os.times()[:4]) - start
        for key in self._now:
            self.tests.setdefault(key, []).append(item.nodeid)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def _pytest(arguments: Iterable[str], plugin: object) -> int:
    os.chdir(ROOT)
    # Files that are named here would be rewritten by pytest itself, behind the finder's back.
    options = [
        "--assert=plain",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "pytest_timeout",
        "-o",
        "timeout=120",
    ]
    return int(pytest.main([*options, *arguments], plugins=[plugin]))


def profiled(modules: Sequence[str], tests: Sequence[str]) -> Profile:
    """Run tests, and the doctests of modules, of the code as it is.

    Args:
        modules: Files.
        tests: Files and folders.
    """

    def work() -> Any:
        recorder = _Recorder()
        setattr(builtins, _HIT, recorder.hit)
        sys.meta_path.insert(0, _Finder({_module(m): _probing(m) for m in modules}))
        _pytest([*tests, *modules], recorder)
        return [recorder.seconds, recorder.tests, recorder.failed]

    found = forked(work, 3600)
    if found is None or not found[0]:
        raise RuntimeError(f"no test ran in {', '.join(tests)}; MUTANTS_LOG=FILE keeps the output")
    return Profile(*found)


def _probing(path: str) -> Callable[[str, str], CodeType]:
    def change(file: str, source: str) -> CodeType:
        tree = ast.fix_missing_locations(_Probed(path).visit(ast.parse(source)))
        return compile(tree, file, "exec")

    return change


class _Chosen:
    """A plugin of pytest: some tests in an order, and the one that failed."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._place = {test: i for i, test in enumerate(tests)}
        self.failed: str | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._place),
            key=lambda item: self._place[item.nodeid],
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed = self.failed or f"{report.nodeid} (on import)"


def noticed_by(path: str, source: str, tests: Sequence[str], seconds: float) -> str | None:
    """The first test that fails with a changed module; None where all pass.

    Args:
        path: The module's file.
        source: Its changed source.
        tests: The tests, in order.
        seconds: CPU seconds that they take with the code as it is.
    """

    def work() -> Any:
        chosen = _Chosen(tests)
        change = {_module(path): lambda file, _: compile(source, file, "exec")}
        sys.meta_path.insert(0, _Finder(change))
        status = _pytest(["-x", *dict.fromkeys(map(_file, tests))], chosen)
        return [status, chosen.failed]

    if not tests:
        return None
    found = forked(work, 10 + 3 * seconds)
    if found is None:
        return "the end of its process, or its time limit"
    status, failed = found
    if status == pytest.ExitCode.OK:
        return None
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RuntimeError(f"pytest finds none of {tests[:3]}; MUTANTS_LOG=FILE keeps its output")
    return str(failed or "an import")
