from __future__ import annotations

import sys

import pytest

from fxqfix.errors import MissingDependencyError
from tests.report import samples


@pytest.mark.parametrize(
    ("module", "method", "extra"),
    [("pandas", "to_pandas", "pandas"), ("matplotlib.pyplot", "plot", "plot")],
)
def test_missing_extra_is_named(
    module: str, method: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError) as caught:
        getattr(samples.sample(), method)()
    assert isinstance(caught.value, ImportError)
    assert str(caught.value).startswith(f"Report.{method}: ")
    assert f"pip install 'fxqfix[{extra}]'" in str(caught.value)


def test_other_renderings_need_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pandas", "matplotlib", "matplotlib.pyplot", "tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    report = samples.sample()
    for render in (report.to_csv, report.to_json, report.to_html, report.to_dot, report.table):
        assert "conv1.weight" in render()
