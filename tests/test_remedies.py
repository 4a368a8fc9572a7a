"""What an error tells to do helps with the very input that raised it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx

import fxqfix
from fxqfix import errors
from fxqfix.passes import FloatIslands, PinRanges
from fxqfix.report import Report
from tests.odd_models import by_fx, eager, perceptron, rows

pytestmark = pytest.mark.filterwarnings("ignore")


def prepared() -> nn.Module:
    return by_fx(perceptron(), tq.get_default_qconfig_mapping("fbgemm"), rows())[0]


def converted(model: nn.Module) -> nn.Module:
    torch.backends.quantized.engine = "fbgemm"
    found: nn.Module = convert_fx(copy.deepcopy(model))
    return found


def _branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


@torch.fx.wrap
def _wrapped(x: Tensor) -> Tensor:
    return _branch(x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _branch(x)


class Calling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _wrapped(x)


def not_traceable() -> tuple[Callable[[], Any], Callable[[], Any]]:
    return lambda: fxqfix.trace(Branching()), lambda: fxqfix.trace(Calling(), rows())


def spoiled_observer() -> tuple[Callable[[], Any], Callable[[], Any]]:
    model, (x,) = eager(tq.QConfig(tq.MinMaxObserver, tq.default_weight_observer))

    def reset() -> None:
        for module in model.modules():
            if isinstance(module, tq.MinMaxObserver):
                module.reset_min_max_vals()
        model(x)
        fxqfix.freeze(model)

    with torch.no_grad():
        model(x * float("inf"))
        model(x * float("nan"))
    return lambda: fxqfix.freeze(model), reset


def never_calibrated() -> tuple[Callable[[], Any], Callable[[], Any]]:
    mapping = tq.get_default_qconfig_mapping("fbgemm")
    model = prepare_fx(perceptron(), mapping, (rows(),))

    def calibrated() -> None:
        model(rows())
        fxqfix.compare(model, None, [rows()], engine="fbgemm")

    return lambda: fxqfix.compare(model, None, [rows()], engine="fbgemm"), calibrated


def no_ranges(call: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    model = prepared()
    int8 = converted(model)
    calls: dict[str, Callable[[nn.Module], Any]] = {
        "certify": lambda m: fxqfix.certify(m, "export", [rows()]),
        "to_decomposed": fxqfix.to_decomposed,
    }
    act = calls[call]
    return lambda: act(int8), lambda: act(fxqfix.to_decomposed(int8, ranges_from=model))


def reference_without_ranges() -> tuple[Callable[[], Any], Callable[[], Any]]:
    model = prepared()
    reference = convert_to_reference_fx(copy.deepcopy(model))
    return (
        lambda: fxqfix.extract_parameters(reference),
        lambda: fxqfix.extract_parameters(fxqfix.to_decomposed(reference, ranges_from=model)),
    )


def traced_eager() -> tuple[Callable[[], Any], Callable[[], Any]]:
    model, _ = eager(tq.get_default_qconfig("fbgemm"))
    return (
        lambda: fxqfix.to_int8(fxqfix.trace(model), engine="fbgemm"),
        lambda: fxqfix.to_int8(model, engine="fbgemm"),
    )


def swapped() -> tuple[Callable[[], Any], Callable[[], Any]]:
    model = prepared()
    int8 = converted(model)
    return (
        lambda: fxqfix.compare(int8, model, [rows()], engine="fbgemm"),
        lambda: fxqfix.compare(model, int8, [rows()], engine="fbgemm"),
    )


def used_up() -> tuple[Callable[[], Any], Callable[[], Any]]:
    model, batches = prepared(), iter([rows()])
    next(batches)
    return (
        lambda: fxqfix.compare(model, None, batches, engine="fbgemm"),
        lambda: fxqfix.compare(model, None, [rows()], engine="fbgemm"),
    )


def on_meta() -> tuple[Callable[[], Any], Callable[[], Any]]:
    model, state = prepared(), prepared().state_dict()

    def loaded() -> None:
        given = model.to("meta").to_empty(device="cpu")
        given.load_state_dict(state)
        fxqfix.inspect(given)

    return lambda: fxqfix.inspect(copy.deepcopy(model).to("meta")), loaded


def gradients_kept() -> tuple[Callable[[], Any], Callable[[], Any]]:
    mapping = tq.QConfigMapping().set_global(tq.default_debug_qconfig)
    model, again = (prepare_fx(perceptron(), mapping, (rows(),)) for _ in range(2))
    model(rows())
    with torch.no_grad():
        again(rows())
    return lambda: fxqfix.freeze(model), lambda: fxqfix.freeze(again)


def in_train_mode(path: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    model = prepared().train()
    return (
        lambda: fxqfix.migrate(model, [rows()], path / "model.pt2"),
        lambda: fxqfix.migrate(copy.deepcopy(model).eval(), [rows()], path / "model.pt2"),
    )


def computed_weight(path: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    from tests.odd_models import MODELS

    model, data = MODELS["weight-computed"]()
    return (
        lambda: fxqfix.migrate(model, data, path / "model.pt2"),
        lambda: fxqfix.certify(model, "export", data),
    )


def equalized() -> tuple[Callable[[], Any], Callable[[], Any]]:
    from tests.odd_models import MODELS

    return lambda: fxqfix.freeze(MODELS["equalized"]()[0]), lambda: fxqfix.freeze(prepared())


def weight_of_the_input() -> tuple[Callable[[], Any], Callable[[], Any]]:
    from tests.odd_models import MODELS

    model, _ = MODELS["weight-conv"]()
    return lambda: fxqfix.to_int8(model, engine="fbgemm"), lambda: fxqfix.to_decomposed(model)


def nothing_observed() -> tuple[Callable[[], Any], Callable[[], Any]]:
    from tests.odd_models import MODELS

    return lambda: fxqfix.inspect(MODELS["float16"]()[0]), lambda: fxqfix.inspect(prepared())


def dynamic() -> tuple[Callable[[], Any], Callable[[], Any]]:
    from tests.odd_models import MODELS

    model = MODELS["dynamic-fx"]()[0]
    return lambda: fxqfix.to_decomposed(model), lambda: fxqfix.to_decomposed(prepared())


def other_dialect() -> tuple[Callable[[], Any], Callable[[], Any]]:
    model = fxqfix.to_decomposed(prepared())
    return lambda: fxqfix.emulate(model, engine="fbgemm"), lambda: model(rows())


def not_frozen() -> tuple[Callable[[], Any], Callable[[], Any]]:
    islands, model = FloatIslands({"0": "float"}), prepared()
    return lambda: islands(model), lambda: islands(fxqfix.freeze(model))


def a_pass_on_an_eager_model() -> tuple[Callable[[], Any], Callable[[], Any]]:
    model, _ = eager(tq.get_default_qconfig("fbgemm"))
    return (
        lambda: PinRanges()(model),
        lambda: PinRanges()(fxqfix.to_decomposed(fxqfix.trace(model))),
    )


def no_culprits() -> tuple[Callable[[], Any], Callable[[], Any]]:
    model = prepared()
    return (
        lambda: Report(rows=()).culprits(),
        lambda: fxqfix.compare(model, None, [rows()], engine="fbgemm", culprits=5).culprits(),
    )


def misspelt() -> tuple[Callable[[], Any], Callable[[], Any]]:
    found = fxqfix.inspect(prepared())
    return lambda: found.site("input1"), lambda: found.site("input_1")


def on_gradients_of_another_batch() -> tuple[Callable[[], Any], Callable[[], Any]]:
    model, x = prepared(), rows()
    return (
        lambda: fxqfix.compare(model, None, [x * float("nan")], engine="fbgemm"),
        lambda: fxqfix.compare(model, None, [x], engine="fbgemm"),
    )


def wrong_shape() -> tuple[Callable[[], Any], Callable[[], Any]]:
    model = prepared()
    return (
        lambda: fxqfix.compare(model, None, [torch.ones(4, 9)], engine="fbgemm"),
        lambda: fxqfix.compare(model, None, [torch.ones(4, 8)], engine="fbgemm"),
    )


Pair = tuple[Callable[[], Any], Callable[[], Any]]
CASES: dict[str, tuple[type[Exception], str, Callable[[Path], Pair]]] = {
    "trace": (errors.TraceError, "torch.fx.wrap", lambda _: not_traceable()),
    "spoiled": (errors.NonFiniteError, "reset_min_max_vals()", lambda _: spoiled_observer()),
    "never": (errors.UncalibratedError, "run calibration data", lambda _: never_calibrated()),
    "ranges": (
        errors.RangeUnknownError,
        "fxqfix.to_decomposed(model, ranges_from=prepared)",
        lambda _: no_ranges("to_decomposed"),
    ),
    "ranges-certify": (
        errors.RangeUnknownError,
        "fxqfix.to_decomposed(model, ranges_from=prepared)",
        lambda _: no_ranges("certify"),
    ),
    "ranges-reference": (
        errors.RangeUnknownError,
        "fxqfix.to_decomposed(model, ranges_from=prepared)",
        lambda _: reference_without_ranges(),
    ),
    "traced": (errors.DialectError, "an eager model as it is", lambda _: traced_eager()),
    "swapped": (errors.PairingError, "compare(prepared, converted, data)", lambda _: swapped()),
    "used up": (errors.DataError, "pass the DataLoader itself", lambda _: used_up()),
    "meta": (errors.DeviceError, "model.to_empty(device='cpu')", lambda _: on_meta()),
    "gradients": (errors.UnsupportedError, "torch.no_grad()", lambda _: gradients_kept()),
    "train": (errors.FxqfixError, "prepared.eval()", in_train_mode),
    "computed": (errors.RouteError, "fxqfix.certify take the model as it is", computed_weight),
    "equalized": (errors.UnsupportedError, "without _equalization_config", lambda _: equalized()),
    "given": (
        errors.PassError,
        "fxqfix.to_decomposed takes it as it is",
        lambda _: weight_of_the_input(),
    ),
    "unobserved": (errors.DialectError, "qconfig", lambda _: nothing_observed()),
    "dynamic": (errors.UnsupportedError, "statically", lambda _: dynamic()),
    "decomposed": (errors.DialectError, "run it as it is", lambda _: other_dialect()),
    "not frozen": (errors.UnsupportedError, "fxqfix.freeze(prepared)", lambda _: not_frozen()),
    "eager pass": (
        errors.DialectError,
        "fxqfix.trace(model)",
        lambda _: a_pass_on_an_eager_model(),
    ),
    "culprits": (errors.DataError, "culprits=5", lambda _: no_culprits()),
    "misspelt": (errors.UnknownNameError, "use one of ['input_1'", lambda _: misspelt()),
    "nan": (errors.NonFiniteError, "clean the data", lambda _: on_gradients_of_another_batch()),
    "shape": (
        errors.ModelRunError,
        "each batch has to be what the model's forward takes",
        lambda _: wrong_shape(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_remedy_helps(case: str, tmp_path: Path) -> None:
    kind, said, make = CASES[case]
    act, remedied = make(tmp_path)
    with pytest.raises(kind) as caught:
        act()
    assert isinstance(caught.value, errors.FxqfixError)
    assert caught.value.where
    assert said in str(caught.value)
    remedied()


def test_every_kind_of_error_is_met() -> None:
    met = {kind for kind, _, _ in CASES.values()}
    # Of the rest, tests/test_bad_input.py has one each.
    assert {errors.TraceError, errors.DialectError, errors.UnsupportedError} <= met
    assert {errors.PairingError, errors.RangeUnknownError, errors.UncalibratedError} <= met
    assert {errors.NonFiniteError, errors.DataError, errors.ModelRunError} <= met
    assert {errors.RouteError, errors.DeviceError, errors.PassError} <= met


def test_no_remedy_names_what_is_not_there() -> None:
    """Functions of fxqfix that a remedy names exist, and take what it gives them."""
    import re

    root = Path(fxqfix.__file__).parent
    for path in root.rglob("*.py"):
        for text in re.findall(r"remedy=((?:\s*f?\"[^\"]*\")+)", path.read_text()):
            for name in re.findall(r"fxqfix\.(\w+)\(", text):
                assert hasattr(fxqfix, name), (path, name)
