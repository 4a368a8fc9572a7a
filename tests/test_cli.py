from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch

import fxqfix
from fxqfix import cli, ops
from fxqfix.errors import PairingError
from fxqfix.report import Coverage, Report, Uncovered, text
from tests.report import samples

MODELS = """
import torch

def pair():
    return torch.nn.ReLU(), None, [torch.zeros(1)]

def pair_as_dict():
    prepared, converted, data = pair()
    return {"prepared": prepared, "data": data, "engine": "qnnpack"}

def model():
    return torch.nn.ReLU()

def two():
    return pair()[:2]

def number():
    return 7

def other_keys():
    return {"prepared": model(), "dataa": []}

def no_data():
    return {"prepared": model()}

def broken():
    return helper()

def helper():
    raise ValueError("first line\\nsecond line")

def broken_in_torch():
    return torch.zeros(2, 3) @ torch.zeros(2, 3)

constant = 1
"""

Outcome = tuple[int, str, str]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run the CLI in a folder with the module `my_models`: (exit code, stdout, stderr)."""
    (tmp_path / "my_models.py").write_text(MODELS, encoding="utf-8")
    (tmp_path / "needs_more.py").write_text("import not_there_at_all", encoding="utf-8")
    (tmp_path / "unfinished.py").write_text("def f(:", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_models", "needs_more", "unfinished"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def outcome(*arguments: str) -> Outcome:
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return outcome


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace fxqfix.compare by one that gives the sample; collects what it was called with."""
    calls: list[dict[str, Any]] = []

    def compare(prepared: Any, converted: Any, data: Any, *, engine: str | None = None) -> Report:
        calls.append({"prepared": prepared, "converted": converted, "data": data, "engine": engine})
        return samples.sample()

    monkeypatch.setattr(fxqfix, "compare", compare, raising=False)
    return calls


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace fxqfix.inspect by one that gives the sample; collects the models."""
    models: list[Any] = []

    def inspect(model: Any) -> Any:
        models.append(model)
        return samples.inspection()

    monkeypatch.setattr(fxqfix, "inspect", inspect, raising=False)
    return models


# --- compare -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "engine"), [("pair", None), ("pair_as_dict", "qnnpack")])
def test_compare_prints_the_report(run, compared, target: str, engine: str | None) -> None:
    assert run("compare", f"my_models:{target}") == (0, f"{samples.sample()}\n", "")
    (call,) = compared
    assert isinstance(call["prepared"], torch.nn.ReLU)
    assert (call["converted"], len(call["data"]), call["engine"]) == (None, 1, engine)


def test_compare_sorts_limits_and_formats(run, compared) -> None:
    arguments = ("compare", "my_models:pair", "--sort", "local", "--limit", "2")
    assert run(*arguments)[1] == text.render(samples.sample(), sort="local", limit=2) + "\n"
    table = samples.sample().table("tsv", sort="local", limit=2)
    assert run(*arguments, "--format", "tsv")[1] == table + "\n"


@pytest.mark.parametrize("suffix", ["csv", "json", "md", "html", "HTML"])
def test_compare_writes_the_file(run, compared, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    code, out, err = run("compare", "my_models:pair", "--output", str(path))
    assert (code, err) == (0, f"fxqfix: wrote {path}\n")
    assert out == f"{samples.sample()}\n"
    report = samples.sample()
    expected = {
        "csv": report.to_csv(),
        "json": report.to_json(),
        "md": text.render(report, "github") + "\n",
        "html": report.to_html(),
    }
    assert path.read_text(encoding="utf-8") == expected[suffix.lower()]


LEFT_OUT = Coverage(unpaired=(Uncovered("a", "prepared", "why"),))


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (samples.sample(), 1),
        (samples.exact_sample(), 0),
        (replace(samples.exact_sample(), coverage=LEFT_OUT), 1),
        (Report(rows=()), 1),
    ],
)
def test_fail_on_difference(run, monkeypatch, report: Report, code: int) -> None:
    monkeypatch.setattr(fxqfix, "compare", lambda *_, **__: report, raising=False)
    assert run("compare", "my_models:pair")[0] == 0
    assert run("compare", "my_models:pair", "--fail-on-difference")[0] == code


# --- inspect -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["model", "pair", "pair_as_dict"])
def test_inspect_prints_the_sites(run, inspected, target: str) -> None:
    expected = text.render_inspection(samples.inspection()) + "\n"
    assert run("inspect", f"my_models:{target}") == (0, expected, "")
    assert [type(model) for model in inspected] == [torch.nn.ReLU]
    table = text.inspection_table(samples.inspection(), "grid") + "\n"
    assert run("inspect", f"my_models:{target}", "--format", "grid")[1] == table


def test_inspect_writes_the_file(run, inspected, tmp_path: Path) -> None:
    for suffix in ("csv", "json", "md", "html"):
        code, _, _ = run("inspect", "my_models:model", "--output", f"sites.{suffix}")
        assert code == 0
    with (tmp_path / "sites.csv").open(encoding="utf-8") as file:
        names = [line["name"] for line in csv.DictReader(file)]
    sites = json.loads((tmp_path / "sites.json").read_text(encoding="utf-8"))["sites"]
    assert names == [site["name"] for site in sites] == [s.name for s in samples.inspection()]
    for suffix in ("md", "html"):
        assert "conv1.weight" in (tmp_path / f"sites.{suffix}").read_text(encoding="utf-8")


# --- the user's errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("my_models",), "names no function. Found: my_models. Expected: pkg.module:function."),
        (("my_models:",), "names no function"),
        ((":pair",), "names no function"),
        (("no_such_module:f",), "import of no_such_module failed. Found: ModuleNotFoundError"),
        (("needs_more:f",), "No module named 'not_there_at_all' (at needs_more.py:1)."),
        (("unfinished:f",), "import of unfinished failed. Found: SyntaxError"),
        (("my_models:pairr",), "no function 'pairr'. Found: functions pair,"),
        (("my_models:constant",), "no function 'constant'"),
        (("my_models:two",), "Found: a tuple of 2. Expected: (prepared, converted or None, data)"),
        (("my_models:number",), "Found: int."),
        (("my_models:other_keys",), "Found: prepared, dataa."),
        (("my_models:no_data",), "returned no data"),
        (("my_models:broken",), "ValueError: first line second line (at my_models.py:"),
        (("my_models:broken_in_torch",), "(at my_models.py:"),
        (("my_models:pair", "--format", "grit"), "no table format is named 'grit'"),
        (("my_models:pair", "--sort", "locl"), "use 'local' or another"),
        (("my_models:pair", "--output", "x.xml"), "Found: .xml. Expected: one of .csv, .json"),
        (("my_models:pair", "--output", "x"), "Found: no suffix"),
        (("my_models:pair", "--output", "no/x.csv"), "there is no folder no."),
    ],
)
def test_error_of_the_user_is_one_line(
    run, compared, arguments: tuple[str, ...], expected: str
) -> None:
    code, out, err = run("compare", *arguments)
    assert (code, out) == (2, "")
    assert expected in err
    assert err.startswith("fxqfix: ")
    assert err.count("\n") == 1
    assert compared == []


def test_bad_options_are_refused_before_the_function_runs(run, compared, tmp_path: Path) -> None:
    module = "open('ran', 'w').close()\ndef pair(): raise SystemExit"
    (tmp_path / "eager_module.py").write_text(module, encoding="utf-8")
    for option, value in (("--output", "x.xml"), ("--format", "grit"), ("--sort", "locl")):
        assert run("compare", "eager_module:pair", option, value)[0] == 2
    assert not (tmp_path / "ran").exists()


def test_error_of_fxqfix_is_one_line(run, monkeypatch) -> None:
    def compare(*_: Any, **__: Any) -> Report:
        raise PairingError("the models\nare swapped", where="compare")

    monkeypatch.setattr(fxqfix, "compare", compare, raising=False)
    assert run("compare", "my_models:pair") == (
        2,
        "",
        "fxqfix: compare: the models are swapped.\n",
    )


@pytest.mark.parametrize(
    "arguments", [(), ("compare",), ("compare", "my_models:pair", "--limit", "0"), ("nothing",)]
)
def test_argparse_refuses_with_code_2(run, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2


# --- demo, passes, causes, ops -------------------------------------------------------------------


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace fxqfix.demos by two demos that print their name."""
    names: list[str] = []

    def play(name: str, out: TextIO) -> None:
        names.append(name)
        print("demo", name, file=out)

    demos = types.ModuleType("fxqfix.demos")
    vars(demos).update(names=lambda: ["000", "digits"], run=play)
    monkeypatch.setitem(sys.modules, "fxqfix.demos", demos)
    monkeypatch.setattr(fxqfix, "demos", demos, raising=False)
    return names


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((), ["000", "digits"]), (("all",), ["000", "digits"]), (("digits",), ["digits"])],
)
def test_demo_runs_all_by_default(run, played, arguments, expected: list[str]) -> None:
    code, out, err = run("demo", *arguments)
    assert (code, out.split("\n")[:-1], err) == (0, [f"demo {name}" for name in expected], "")
    assert played == expected


def test_unknown_demo_lists_those_that_exist(run, played) -> None:
    code, _, err = run("demo", "001")
    assert (code, played) == (2, [])
    assert "Expected: 000, digits or all." in err


def test_ops_lists_the_table(run) -> None:
    code, out, _ = run("ops", "--format", "tsv")
    assert code == 0
    lines = [[cell.strip() for cell in line.split("\t")] for line in out.splitlines()]
    assert lines[1:] == [[row.key, row.family, row.output] for row in ops.TABLE]


def test_passes_show_the_first_line_of_their_docstring(run, monkeypatch) -> None:
    class Fold:
        """Fold one thing into another.

        More about it.
        """

    monkeypatch.setattr("fxqfix.passes.registry", lambda: {"fold-it": Fold}, raising=False)
    assert run("passes", "--format", "tsv")[1].split("\t")[-1] == "Fold one thing into another.\n"


def test_causes_show_what_repairs_them(run, monkeypatch) -> None:
    cause = types.SimpleNamespace(name="rounding", summary="ties", repair=None)
    monkeypatch.setattr("fxqfix.causes.registry", lambda: (cause,), raising=False)
    out = run("causes", "--format", "plain")[1]
    assert out.splitlines()[1].split() == ["rounding", "ties", "-"]


@pytest.mark.parametrize(
    ("command", "listed"), [("passes", "fxqfix.passes"), ("causes", "fxqfix.causes")]
)
def test_registries_are_listed(run, command: str, listed: str) -> None:
    code, out, _ = run(command)
    assert code == 0
    for entry in importlib.import_module(listed).registry():
        assert (entry if isinstance(entry, str) else entry.name) in out


# --- the process ---------------------------------------------------------------------------------


def fxqfix_process(
    arguments: str, tmp_path: Path, tail: str = ""
) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from fxqfix.cli import main; sys.exit(main({arguments!r}.split()))"
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        f'"{sys.executable}" -c "{code}" {tail}',
        shell=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )


def test_version_is_printed(tmp_path: Path) -> None:
    found = fxqfix_process("--version", tmp_path)
    assert found.returncode == 0
    assert found.stdout.startswith("fxqfix ")


def test_closed_pipe_is_no_error(tmp_path: Path) -> None:
    # `true` is gone long before the first line is written.
    found = fxqfix_process("ops --format grid", tmp_path, "| true")
    assert (found.stdout, found.stderr) == ("", "")
