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
from fxqfix.errors import MissingDependencyError, PairingError, UnknownNameError
from fxqfix.report import Coverage, Report, Uncovered, text
from tests.builds import elsewhere
from tests.report import samples

MODELS = """
import copy
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

def trained():
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
    torch.manual_seed(0)
    x, net = torch.rand(4, 8), torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    prepared = prepare_qat_fx(net.train(), mapping, (x,))
    prepared(x)
    prepared.eval()
    converted = convert_fx(copy.deepcopy(prepared))
    data = iter([x, 3 * x])
    return {"prepared": prepared, "converted": converted, "data": data, "engine": "fbgemm"}

def trained_int8():
    found = trained()
    return {"prepared": found["converted"], "ranges_from": found["prepared"], "data": found["data"]}

def leaves():
    raise SystemExit(1)

def beside():
    return {"prepared": torch.nn.ReLU(), "data": [], "float_model": "the float model"}

def breaks_off():
    def batches():
        yield torch.rand(4, 8)
        raise KeyError("disk")
    return {**trained(), "data": batches()}

def in_train_mode():
    found = trained()
    found["prepared"].train()
    return found
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

    def compare(prepared: Any, converted: Any, data: Any, **options: Any) -> Report:
        calls.append({"prepared": prepared, "converted": converted, "data": data, **options})
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
    assert run("compare", f"my_models:{target}") == (1, f"{samples.sample()}\n", "")
    (call,) = compared
    assert isinstance(call["prepared"], torch.nn.ReLU)
    assert (call["converted"], len(call["data"]), call["engine"]) == (None, 1, engine)


def test_compare_sorts_limits_and_formats(run, compared) -> None:
    arguments = ("compare", "my_models:pair", "--sort", "local", "--limit", "2")
    assert run(*arguments)[1] == text.render(samples.sample(), sort="local", limit=2) + "\n"
    table = samples.sample().table("tsv", sort="local", limit=2)
    assert run(*arguments, "--format", "tsv")[1] == table + "\n"


@pytest.mark.parametrize("suffix", ["csv", "json", "md", "html", "HTML", "dot", "graphml", "svg"])
def test_compare_writes_the_file(run, compared, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    code, out, err = run("compare", "my_models:pair", "--output", str(path))
    assert (code, err) == (1, f"fxqfix: wrote {path}\n")
    assert out == f"{samples.sample()}\n"
    report = replace(samples.sample(), made={"model": "my_models:pair"})
    expected = {
        "csv": report.to_csv(),
        "json": report.to_json(),
        "md": report.to_markdown(),
        "html": report.to_html(),
        "dot": report.to_dot(),
        "graphml": report.to_graphml(),
    }
    written = path.read_text(encoding="utf-8")
    if suffix == "svg":  # ids are drawn anew
        assert written.rstrip().endswith("</svg>")
        assert "conv1.weight" in written
    else:
        assert written == expected[suffix.lower()]


def test_compare_hands_the_float_model_on(run, compared) -> None:
    run("compare", "my_models:beside")
    assert compared[0]["float_model"] == "the float model"


def test_compare_takes_an_engine_and_counts_culprits(run, compared) -> None:
    run("compare", "my_models:pair", "--engine", "qnnpack", "--culprits", "3")
    assert (compared[0]["engine"], compared[0]["culprits"]) == ("qnnpack", 3)


_SITE, *_REST = samples.exact_sample().rows
_ROUNDED = replace(_SITE, local=samples.apart(64, 1), causes={"rounding": 1}, either=1)
ROUNDED = replace(samples.exact_sample(), rows=(_ROUNDED, *_REST))
LEFT_OUT = Coverage(unpaired=(Uncovered("a", "prepared", "why"),))


@pytest.mark.parametrize(
    ("report", "code", "strict"),
    [
        (samples.sample(), 1, 1),
        (samples.exact_sample(), 0, 0),
        (ROUNDED, 0, 1),
        (replace(samples.exact_sample(), coverage=LEFT_OUT), 2, 2),
        (Report(rows=()), 2, 2),
    ],
)
def test_exit_codes_of_compare(run, monkeypatch, report: Report, code: int, strict: int) -> None:
    monkeypatch.setattr(fxqfix, "compare", lambda *_, **__: report, raising=False)
    assert run("compare", "my_models:pair")[0] == code
    assert run("compare", "my_models:pair", "--fail-on-difference")[0] == strict


def test_allowed_causes_and_shares(run, monkeypatch) -> None:
    report = replace(
        samples.exact_sample(), rows=(replace(_ROUNDED, causes={"scale-formula": 1}), *_REST)
    )
    monkeypatch.setattr(fxqfix, "compare", lambda *_, **__: report, raising=False)
    arguments = ("compare", "my_models:pair")
    assert run(*arguments)[0] == 1
    assert run(*arguments, "--allow", "scale-formula")[0] == 0
    code, _, err = run(*arguments, "--allow", "scale-formula", "--max-share", "0.001")
    assert (code, "more than 0.001 of the codes differ at x" in err) == (1, True)
    assert run(*arguments, "--allow", "scale")[0] == 2


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


# --- migrate, certify ----------------------------------------------------------------------------


def test_migrate_writes_and_certifies(run, tmp_path: Path) -> None:
    code, out, err = run("migrate", "my_models:trained", "--dynamic-batch")
    assert (code, err) == (0, "")
    assert out.startswith("migrate: model.pt2, ")
    assert "any batch size: ok" in out
    assert "its outputs against freeze(prepared): 0 of 32 values differ" in out
    assert "certify: route export, torch" in out
    assert "2 batches: exact" in out
    assert "the old conversion, against the prepared model: not ok" in out
    assert "- range-lost: " in out
    program: Any = torch.export.load(tmp_path / "model.pt2")
    assert program.module()(torch.rand(7, 8)).shape == (7, 4)


@pytest.mark.parametrize("pins", ["values", "codes", "none"])
def test_migrate_pins_ranges_where_it_is_told(run, tmp_path: Path, pins: str) -> None:
    code, out, err = run("migrate", "my_models:trained", "--pins", pins)
    if elsewhere() and "the saved program is not the graph" in err:
        pytest.skip("this torch.export drops clamps of codes; the file is refused")
    assert code == 0
    assert ("pinned by a clamp: 0" in out) == (pins == "none")
    graph = fxqfix.trace(torch.export.load(tmp_path / "model.pt2"))
    names = [n.name for n in graph.graph.nodes if "clamp" in str(n.target)]
    codes = [n for n in graph.graph.nodes if n.name in names and "quantize" in str(n.args[0])]
    assert bool(names) == (pins != "none")
    assert bool(codes) == (pins == "codes")


def test_an_opset_is_for_onnx(run) -> None:
    code, _, err = run("certify", "my_models:trained", "--route", "export", "--opset", "21")
    assert code == 2
    assert "route export has no opset" in err


def test_migrate_takes_an_int8_model_with_ranges(run, tmp_path: Path) -> None:
    arguments = ("--no-pins", "--output", "small.pt2")
    code, out, _ = run("migrate", "my_models:trained_int8", *arguments)
    assert code == 0
    assert "no prepared model was given (fx-int8)" in out
    assert "pinned by a clamp: 0" in out
    assert (tmp_path / "small.pt2").stat().st_size > 0


def test_certify_prints_and_writes(run, tmp_path: Path) -> None:
    arguments = ("certify", "my_models:trained", "--route", "export", "--fail-on-difference")
    code, out, err = run(*arguments, "--output", "cert.json")
    assert (code, err) == (0, "fxqfix: wrote cert.json\n")
    assert out.startswith("certify: route export, torch")
    assert json.loads((tmp_path / "cert.json").read_text(encoding="utf-8"))["exact"] is True


@pytest.mark.parametrize(
    ("verdict", "exact", "code", "strict"),
    [
        ("ok", True, 0, 0),
        ("ok", False, 0, 1),
        ("not ok", False, 1, 1),
        ("not judged", False, 2, 2),
    ],
)
def test_exit_codes_of_certify_and_migrate(
    run, monkeypatch, verdict: str, exact: bool, code: int, strict: int
) -> None:
    given: list[dict[str, Any]] = []

    def result(*_: Any, **options: Any) -> Any:
        given.append(options)
        return types.SimpleNamespace(verdict=verdict, exact=exact)

    for name in ("certify", "migrate"):
        monkeypatch.setattr(fxqfix, name, result)
    assert run("certify", "my_models:pair", "--route", "export")[0] == code
    arguments = ("certify", "my_models:pair", "--route", "export", "--fail-on-difference")
    assert run(*arguments, "--dynamic-batch")[0] == strict
    assert [options["dynamic_batch"] for options in given] == [False, True]
    assert run("migrate", "my_models:pair_as_dict", "--no-pins")[0] == code
    assert given[-1] == {
        "converted": None,
        "ranges_from": None,
        "pin_ranges": False,
        "dynamic_batch": False,
        "route": "export",
        "engine": "qnnpack",
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("migrate", "my_models:no_data"), "returned no data. Expected: an iterable of batches"),
        (("migrate", "my_models:in_train_mode"), "migrate: the model is in train mode"),
        (("migrate", "my_models:pair"), "migrate: ReLU holds no observer"),
        (("migrate", "my_models:number"), "returned something else than models. Found: int"),
        (("migrate", "my_models:broken", "--output", "no/m.pt2"), "there is no folder no"),
        (("migrate", "my_models:broken", "--output", "m.onnx"), "FOLDER/NAME.pt2"),
        (("migrate", "my_models:broken", "--route", "tflite"), "'tflite'"),
        (("migrate", "my_models:broken", "--route", "int8:x86"), "fxqfix.certify(prepared, "),
        (("certify", "my_models:no_data", "--route", "export"), "returned no data"),
        (("certify", "my_models:broken", "--route", "tflite"), "'tflite'"),
        (
            ("certify", "my_models:broken", "--route", "export", "--output", "x.csv"),
            "one of .json, .txt",
        ),
    ],
)
def test_what_migrate_and_certify_refuse(
    run, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    files = sorted(tmp_path.iterdir())
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1
    assert [f for f in sorted(tmp_path.iterdir()) if f not in files and f.suffix != ""] == []


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
        (("my_models:pairr",), "no function 'pairr'. Expected: one of its functions: pair,"),
        (("./my_models:pair",), "a module's name is due. Found: ./my_models:pair."),
        (("./my_models.py:pair",), "To do: write my_models:pair, in the folder of my_models.py"),
        (("my_models:constant",), "no function 'constant'"),
        (("my_models:two",), "Found: a tuple of 2. Expected: (prepared, converted or None, data)"),
        (("my_models:number",), "Found: int."),
        (("my_models:other_keys",), "Found: prepared, dataa."),
        (("my_models:no_data",), "returned no data"),
        (("my_models:leaves",), "leaves() failed. Found: SystemExit: 1 (at my_models.py:"),
        (("my_models:broken",), "ValueError: first line second line (at my_models.py:"),
        (("my_models:broken_in_torch",), "(at my_models.py:"),
        (("my_models:pair", "--format", "grit"), "no table format is named 'grit'"),
        (("my_models:pair", "--sort", "locl"), "use 'local' or another"),
        (("my_models:pair", "--output", "x.xml"), "Found: .xml. Expected: one of .csv, .dot"),
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


@pytest.mark.parametrize("command", [("compare",), ("certify", "--route", "export")])
def test_data_that_breaks_off_is_an_error_of_the_user(run, command: tuple[str, ...]) -> None:
    code, out, err = run(*command, "my_models:breaks_off")
    assert (code, out) == (2, "")  # 1 would say that something differs
    assert "the data of my_models:breaks_off failed. Found: KeyError: 'disk' (at my_models" in err


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
        if name not in demos.names():
            raise UnknownNameError(f"no demo is named {name!r}")
        names.append(name)
        print("demo", name, file=out)

    demos: Any = types.ModuleType("fxqfix.demos")
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


def test_a_demo_without_its_extra_is_left_out(run, monkeypatch) -> None:
    def play(name: str, out: Any) -> None:
        if name in gone:
            raise MissingDependencyError("sklearn can't be imported", where=f"demo {name}")
        print("demo", name, file=out)

    demos = types.ModuleType("fxqfix.demos")
    vars(demos).update(names=lambda: ["000", "digits"], run=play)
    monkeypatch.setitem(sys.modules, "fxqfix.demos", demos)
    monkeypatch.setattr(fxqfix, "demos", demos, raising=False)
    gone = ["digits"]
    said = "fxqfix: left out: demo digits: sklearn can't be imported.\n"
    assert run("demo") == (0, "demo 000\n", said)
    assert run("demo", "digits")[:2] == (2, "")
    gone = ["000", "digits"]
    assert run("demo")[0] == 2


def test_unknown_demo_lists_those_that_exist(run, played) -> None:
    code, _, err = run("demo", "005")
    assert (code, played) == (2, [])
    assert "Expected: 000, digits or all." in err


def test_ops_lists_the_table(run) -> None:
    code, out, _ = run("ops", "--format", "tsv")
    assert code == 0
    lines = [[cell.strip() for cell in line.split("\t")] for line in out.splitlines()]
    assert lines[1:] == [[row.key, row.family, row.output] for row in ops.TABLE]


def test_rewrite_runs_a_pipeline_and_prints_each_edit(run) -> None:
    pipeline = "freeze-qparams,decompose-quantize,pin-ranges{where=codes}"
    code, out, _ = run("rewrite", "my_models:trained", pipeline)
    assert code == 0
    heads = [line for line in out.splitlines() if not line.startswith(" ")]
    assert [head.partition(": ")[0] for head in heads] == pipeline.split(",")
    for head in heads:
        assert int(head.split()[-2]) > 0
    code, again, _ = run("rewrite", "my_models:trained", pipeline, "--code")
    assert code == 0
    assert again.count("def forward(self, input):") == 3
    assert "clamp" in again.rpartition("def forward")[2]


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        ("pin-range", "there is no pass 'pin-range'"),
        ("pin-ranges{were=codes}", "pin-ranges has no option 'were'"),
        ("pin-ranges,decompose-quantize", "pin-ranges stands before decompose-quantize"),
    ],
)
def test_rewrite_refuses_what_is_no_pipeline(run, pipeline: str, said: str) -> None:
    code, _, err = run("rewrite", "my_models:trained", pipeline)
    assert (code, err.count("\n")) == (2, 1)
    assert said in err


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
    ("command", "listed"),
    [("passes", "fxqfix.passes"), ("causes", "fxqfix.causes"), ("routes", "fxqfix.routes")],
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
