"""Every row of the known-wrong kernels, run against the kernel."""

from __future__ import annotations

import pytest
import torch

from fxqfix.engines import DEFECTS, Call, find_defect
from fxqfix.engines.listing import coverage, known_wrong
from fxqfix.ops import TABLE

# Wrong on some CPUs only: what the row says of them.
_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
_MACHINE = {"three-groups-crash": _AVX2}
_ONLY_MEASURED_ON_AVX2 = {"transposed-skips-rows"}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_the_kernel_is_still_wrong(defect) -> None:
    """A torch that repairs one fails here: give the row its end, or drop it."""
    if defect.present is None:
        pytest.skip(f"this torch has none of the engines {defect.engines}")
    if defect.name in _ONLY_MEASURED_ON_AVX2 and not _AVX2:
        pytest.skip("not measured on CPUs of this kind")
    assert defect.present is _MACHINE.get(defect.name, True)


def test_rows_name_ops_and_engines_that_exist() -> None:
    keys = {row.key for row in TABLE}
    assert all(set(d.ops) <= keys for d in DEFECTS)
    assert all(set(d.engines) <= {"fbgemm", "onednn", "qnnpack"} for d in DEFECTS)
    assert len({d.name for d in DEFECTS}) == len(DEFECTS)


def test_a_call_finds_its_row() -> None:
    options: dict[str, object] = {"count_include_pad": False, "padding": 1}
    pool = {"node": "pool", "key": "avg_pool2d", "arguments": options}
    found = find_defect(Call(engine="qnnpack", **pool))
    assert found is not None
    assert found.name == "average-counts-padding"
    assert find_defect(Call(engine="fbgemm", **pool)) is None
    options["padding"] = 0
    assert find_defect(Call(engine="qnnpack", **pool)) is None  # nothing is padded


def test_listings() -> None:
    headers, rows = coverage()
    assert all(len(row) == len(headers) for row in rows)
    headers, rows = known_wrong()
    assert [row[0] for row in rows] == [d.name for d in DEFECTS]
    assert all(len(row) == len(headers) for row in rows)
