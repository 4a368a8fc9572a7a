"""Every script of examples/ runs as a user runs it, and says what it promises."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

from tests.warm import ROOT, run_code, run_script

EXAMPLES = ROOT / "examples"

# What each script has to print, in this order.
PROMISES = {
    "quickstart_compare": [
        "not ok, differs in 7 of 7 rows",
        "scale-formula",
        "range-lost",
        "to_decomposed(prepared)        exact: True   causes: {}",
    ],
    "migrate_convert_fx": [
        "To do: fxqfix.to_decomposed(model, ranges_from=prepared)",
        "both sources of ranges agree: True",
        "equal to freeze(prepared): True",
        "'range-lost'",
        "to_decomposed          {}",
        "0, 127, torch.uint8",
        "migrate: model.pt2, ",
        "its outputs against freeze(prepared): 0 of ",
        "2 batches: exact",
        "the old conversion, against the prepared model: not ok",
        "the file, every bit: True",
    ],
    "debug_one_layer": [
        "blocks_1_relu  local   0%  cumulative   0%",
        "from its birth: blocks_2_conv -> blocks_2_relu -> ",
        "'other-weights': ",  # a dropped bias
        "its weight: exact is True",
        "converted: None",
    ],
    "use_passes_with_torch_passmanager": [
        "modified: True",
        "fused kernel",
        "a second time: False",
        "equals to_decomposed: True",
    ],
    "c_engine": [
        "--- the engine as it is: 0 of 196,768 codes differ",
        "--- MISTAKE_TRUNCATION: ",
        "conv2: truncation: the device cuts the fraction off",
        "--- MISTAKE_PADDING: ",
        "conv1: padding-with-zero: the device pads with code 0",
        "--- MISTAKE_ZERO_POINT: ",
        "head: input-zero-point-missing: the device leaves out",
    ],
    "own_route": [
        "in-c",
        "1 batch",
    ],
    "numpy_engine": [
        "accuracy of the int8 model: 9",
        "OIHW 16x8x3x3 int8",
        "conv1                                   0 ",
        "all                                     0 ",
    ],
    "eager_model": [
        "frozen is a Net",
        "convert(prepared)          exact: False  causes: {'scale-formula'",
        "convert(freeze(prepared))  exact: True ",
        "to_decomposed(prepared)    exact: True ",
        "trace: FX can't trace DataDependent",
    ],
    "train_as_deployed": [
        "prepared:            accuracy 0.9",
        "deployed:            accuracy 0.9",
        "trained as deployed: accuracy 0.9",
        "isa=avx2",
        "outputs that differ from to_int8's: 0",
        "moved: ",
    ],
    "deploy": [
        "export       plain   ok: True   0 int8 kernels, 0 lost",
        "export       pinned  ok: True   0 int8 kernels, 0 lost",
        "inductor     plain   ok: False  2 int8 kernels, ",
        "inductor     pinned  ok: True   2 int8 kernels, 0 lost",
        "onnxruntime  plain   ok: False  2 int8 kernels, ",
        "onnxruntime  pinned  ok: True   2 int8 kernels, 0 lost",
        "certify: route onnxruntime, torch ",
    ],
    "pt2e": [
        "pt2e-prepared: 6 sites",
        "lint: ['scale-formula']",
        "convert_pt2e(prepared)          exact: False {'scale-formula': ",
        "convert_pt2e(freeze(prepared))  exact: True  {}",
        "to_decomposed(prepared)         exact: True  {}",
        "equal to the trained model's: True",
        "clamps that hold the range: 3",
    ],
}


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_code("import sys; from fxqfix.cli import main; sys.exit(main())", *arguments)


def in_order(text: str, parts: list[str]) -> bool:
    position = 0
    for part in parts:
        position = text.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True


def test_every_example_is_here() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*PROMISES, "qat_training_script", "cli_entry"}


@pytest.mark.parametrize("name", PROMISES)
def test_example(name: str) -> None:
    if name == "deploy":
        pytest.importorskip("onnxruntime", reason='the extra "onnx" is not installed')
    if name == "pt2e":
        pytest.importorskip("torchao", reason='the extra "pt2e" is not installed')
    result = run_script(f"examples/{name}.py")
    assert result.returncode == 0, result.stderr
    assert in_order(result.stdout, PROMISES[name]), result.stdout


def test_training_script(tmp_path: Path) -> None:
    has_tensorboard = importlib.util.find_spec("tensorboard") is not None
    result = run_script("examples/qat_training_script.py", *[str(tmp_path)] * has_tensorboard)
    assert result.returncode == 0, result.stderr
    assert in_order(result.stdout, ["epoch 0: accuracy", "scale-formula", "epoch 3: accuracy"])
    last = result.stdout.splitlines()[-1]
    assert last.startswith("deployed: accuracy")
    assert "scale-formula" not in last
    assert bool(list(tmp_path.glob("events.out.*"))) == has_tensorboard


def test_command_line_example(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = cli("compare", "examples.cli_entry:models", "--limit", "3", "--output", str(page))
    assert result.returncode == 1, result.stderr  # torch's own conversion of what was trained
    assert "3 of 6 rows shown" in result.stdout
    assert "- scale-formula: " in result.stdout
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(("function", "code"), [("models", 1), ("frozen", 0)])
def test_command_line_example_fails_on_a_difference(function: str, code: int) -> None:
    result = cli("compare", f"examples.cli_entry:{function}", "--fail-on-difference")
    assert result.returncode == code, result.stderr


def test_command_line_example_is_inspected() -> None:
    result = cli("inspect", "examples.cli_entry:prepared")
    assert result.stdout.splitlines()[-1].startswith("fx-prepared: 5 sites"), result.stderr
