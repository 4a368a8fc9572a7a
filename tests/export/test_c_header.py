"""The C header: it compiles without a warning, and C reads back every number."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fxqfix import Parameters
from fxqfix.errors import OptionError
from fxqfix.export import c_header, c_names
from tests.engines.nets import NETS
from tests.test_judge import dumped

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")
FLAGS = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]


def _compiled(folder: Path, parameters: Parameters, body: str) -> str:
    (folder / "parameters.h").write_text(c_header(parameters))
    lines = [
        '#include "parameters.h"',
        "#include <stdio.h>",
        f"int main(void) {{ {body} return 0; }}",
    ]
    (folder / "main.c").write_text("\n".join([*lines, ""]))
    program = str(folder / "main")
    subprocess.run(["cc", *FLAGS, str(folder / "main.c"), "-o", program], check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


@needs_cc
@pytest.mark.parametrize("engine", ["qnnpack", "fbgemm"])
@pytest.mark.parametrize("name", [n for n in NETS if n != "Recurrent"])
def test_it_compiles_without_a_warning(name: str, engine: str, tmp_path: Path) -> None:
    for prepared in (False, True):
        parameters, _ = dumped(name, engine, prepared)
        assert _compiled(tmp_path, parameters, "") == ""


@needs_cc
def test_c_reads_back_every_number(tmp_path: Path) -> None:
    parameters, _ = dumped("Residual", "fbgemm")
    names = c_names([op.name for op in parameters])
    weighted = [op for op in parameters if op.weight is not None]
    body, due = "", []
    for op in weighted:
        n = f"fxq_{names[op.name]}"
        for key, form, value in (
            ("weight", "%d", op.weight),
            ("fixed_multiplier", "%d", op.fixed_multiplier),
            ("fixed_shift", "%d", op.fixed_shift),
            ("multiplier", "%a", op.multiplier),
        ):
            given = "(double)" if form == "%a" else "(int)"
            loop = f"for (int i = 0; i < {value.numel()}; i++)"
            body += f'{loop} printf("{form}\\n", {given}{n}_{key}[i]);'
            due += [float(v) for v in value.flatten().tolist()]
        body += f'printf("%d\\n%a\\n", {n.upper()}_ZERO_POINT, (double){n.upper()}_SCALE);'
        due += [float(op.output.zero_point), torch.tensor(op.output.scale).item()]
    found = [
        float.fromhex(line) if "x" in line else float(line)
        for line in _compiled(tmp_path, parameters, body).split()
    ]
    assert len(weighted) == 4
    assert found == due


@pytest.mark.parametrize("prefix", ["1a", "a b", "", "a-b", "größe"])
def test_a_prefix_that_is_no_identifier_is_refused(prefix: str) -> None:
    with pytest.raises(OptionError, match="C identifier"):
        c_header(Parameters((), (), ()), prefix)


def test_names_are_identifiers() -> None:
    names = ["1", "a.b", "a_b", "int", "größe", ""]
    found = c_names(names)
    assert len(set(found.values())) == len(names)
    assert all(n.isidentifier() and n.isascii() for n in found.values())
