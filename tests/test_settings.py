"""What the user has switched on changes no figure, and is as it was behind every call."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import fxqfix
from fxqfix import _settings, engines
from fxqfix.engines._base import Exact


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).mean([2, 3])
        return self.head(x) + torch.full((4,), 0.5, device=x.device)


def _image() -> Tensor:
    return torch.linspace(-1, 1, 4 * 64, dtype=torch.float32, device="cpu").reshape(4, 1, 8, 8)


@pytest.fixture
def prepared() -> nn.Module:
    torch.backends.quantized.engine = "fbgemm"
    model = prepare_qat_fx(Net().train(), get_default_qat_qconfig_mapping("fbgemm"), (_image(),))
    model(_image())
    return model.eval()


def _default_device() -> AbstractContextManager[Any]:
    return torch.device("meta")  # any tensor made on it has no values


class _DefaultDtype:
    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": _DefaultDtype,
    "default device": _default_device,
}


def _compare(prepared: nn.Module) -> Any:
    report = fxqfix.compare(prepared, None, [_image()], culprits=1)
    return [(r.name, r.local, r.cumulative, r.noise_floor, dict(r.causes)) for r in report.rows]


def _certify(prepared: nn.Module) -> Any:
    found = fxqfix.certify(prepared, "float64", [_image()])
    return found.sites, found.outputs


def _repair(prepared: nn.Module) -> Any:
    with torch.device("cpu"):
        converted = convert_fx(copy.deepcopy(prepared))
    found = fxqfix.repair(prepared, converted, data=[_image()])
    return found.applied, found.refused


def _golden(prepared: nn.Module) -> Any:
    values = fxqfix.golden_vectors(fxqfix.to_int8(prepared), _image()).values
    return {name: (value.dtype, value.tolist()) for name, value in values.items()}


def _state(model: nn.Module) -> Any:
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (t.dtype, str(t.device), t.tolist()) for name, t in found.items()}


FLOWS: dict[str, Callable[[nn.Module], Any]] = {
    "inspect": lambda m: fxqfix.inspect(m).sites,
    "lint": lambda m: fxqfix.lint(m).findings,
    "freeze": lambda m: _state(fxqfix.freeze(m)),
    "to_decomposed": lambda m: _state(fxqfix.to_decomposed(m)),
    "to_int8": lambda m: fxqfix.certificate_of(fxqfix.to_int8(m)),
    "emulate": lambda m: _state(fxqfix.emulate(fxqfix.to_int8(m))),
    "compare": _compare,
    "repair": _repair,
    "certify": _certify,
    "golden_vectors": _golden,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("flow", FLOWS)
def test_no_setting_changes_a_result(flow: str, setting: str, prepared: nn.Module) -> None:
    expected = FLOWS[flow](prepared)
    with SETTINGS[setting]():
        found = FLOWS[flow](prepared)
    assert found == expected


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_emulated_model_is_exact_under_any_setting(setting: str, prepared: nn.Module) -> None:
    int8 = fxqfix.to_int8(prepared)
    emulated = fxqfix.emulate(int8)
    expected = int8(_image())
    with SETTINGS[setting]():
        assert torch.equal(emulated(_image()), expected)


def test_data_is_made_under_the_users_own_settings(prepared: nn.Module) -> None:
    seen = []

    def data() -> Iterator[Tensor]:
        seen.append((torch.get_default_dtype(), torch.is_autocast_enabled("cpu")))
        yield _image()
        seen.append((torch.get_default_dtype(), torch.is_autocast_enabled("cpu")))

    with _DefaultDtype(), torch.autocast("cpu", torch.bfloat16):
        fxqfix.compare(prepared, None, data())
    assert seen == [(torch.float64, True)] * 2


def test_every_public_function_is_an_entry() -> None:
    functions = {n: getattr(fxqfix, n) for n in fxqfix.__all__}
    open_ = [n for n, f in functions.items() if inspect.isfunction(f) and not _guarded(f)]
    assert open_ == ["certificate_of"]  # reads what is there


def _guarded(function: Any) -> bool:
    return hasattr(function, "__wrapped__") and function.__globals__ is vars(_settings)


def test_every_module_of_the_engines_is_guarded() -> None:
    found = set()
    for info in pkgutil.iter_modules(engines.__path__, "fxqfix.engines."):
        module = importlib.import_module(info.name)
        found |= {v for v in vars(module).values() if inspect.isclass(v)}
    own = {c for c in found if issubclass(c, nn.Module) and c.__module__.startswith("fxqfix.eng")}
    assert len(own) > 30
    assert [c for c in own if not issubclass(c, Exact)] == []


# ------------------------------------------------------------- precision of float32 products


def _precision() -> list[Any]:
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # contradicts the new switches
        old = "mixed"
    return [old, *(getattr(place, name) for place, name, _ in _settings._switches(True))]


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The process's switches, put back; CUDA's own among them, as if it were running."""
    monkeypatch.setattr(_settings, "_cuda_runs", lambda: True)
    rows = _settings._switches(True)
    before = [getattr(place, name) for place, name, _ in rows]
    yield rows
    torch.set_float32_matmul_precision("highest")
    with_general = getattr(torch.backends, "fp32_precision", None) is not None
    if with_general:
        torch.backends.fp32_precision = "none"
    for (place, name, _), value in zip(rows, before, strict=True):
        setattr(place, name, value)


def _set_old(value: str) -> Callable[[Any], None]:
    return lambda rows: torch.set_float32_matmul_precision(value)


def _set_new(rows: Any) -> None:
    for place, name, full in rows:
        setattr(place, name, True if full is False else "tf32")


def _set_one(rows: Any) -> None:
    place, name, full = rows[-1]
    setattr(place, name, True if full is False else "bf16")


def _mix(rows: Any) -> None:
    torch.set_float32_matmul_precision("medium")
    _set_new(rows)


def _set_general(rows: Any) -> None:
    if not hasattr(rows[0][0], "fp32_precision"):
        pytest.skip("this torch has no general switch")
    for place, name, _ in rows:
        setattr(place, name, "none")
    torch.backends.fp32_precision = "tf32"


SET = {
    "medium": _set_old("medium"),
    "high": _set_old("high"),
    "new": _set_new,
    "one": _set_one,
    "mixed": _mix,
    "general": _set_general,
}


@pytest.mark.parametrize("how", SET)
def test_float32_is_full_inside_and_as_it_was_behind(how: str, switches: Any) -> None:
    SET[how](switches)
    before = _precision()
    inside = _settings.entry(_precision)()
    # Where old and new switches contradict each other, kernels go by the new ones.
    assert set(inside[how == "mixed" :]) <= {"highest", "none", "ieee", False}
    assert _settings.exact(_precision)() == inside
    assert _precision() == before
    if how == "general":  # what was inherited is so still
        torch.backends.fp32_precision = "none"
        assert set(_precision()[1:]) == {"none"}


@pytest.mark.parametrize("how", SET)
def test_no_precision_changes_a_result(how: str, switches: Any, prepared: nn.Module) -> None:
    expected = _compare(prepared)
    int8 = fxqfix.to_int8(prepared)
    emulated = fxqfix.emulate(int8)
    SET[how](switches)
    assert _compare(prepared) == expected
    assert torch.equal(emulated(_image()), int8(_image()))


def test_settings_come_back_after_an_error() -> None:
    def fails() -> None:
        assert not torch.is_autocast_enabled("cpu")
        raise KeyError

    with _DefaultDtype(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyError):
            _settings.entry(fails)()
        assert torch.get_default_dtype() == torch.float64
        assert torch.is_autocast_enabled("cpu")
    with nullcontext():
        assert not torch.is_autocast_enabled("cpu")


_FROZEN = """
import torch
torch.backends.disable_global_flags()  # as importing torch.testing._internal does; for good
torch.backends.quantized.engine = "fbgemm"
import fxqfix
from fxqfix import _settings
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
x = torch.randn(2, 3, 8, 8)
prepared = prepare_fx(
    nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), get_default_qconfig_mapping("fbgemm"), (x,)
)
prepared(x)
converted = convert_fx(prepared)
assert torch.equal(fxqfix.emulate(converted)(x), converted(x))
with _settings.tensor_float32():
    pass
torch.set_float32_matmul_precision("medium")
assert fxqfix.freeze(prepared) is not None
assert torch.get_float32_matmul_precision() == "medium"
assert torch.backends.flags_frozen()
"""


def test_flags_that_torch_has_frozen() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FROZEN], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
