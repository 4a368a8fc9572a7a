"""What an error that others wrap says: the first reason, in one line, without colours and paths."""

from __future__ import annotations

import tempfile

import pytest
import torch
from torch import Tensor, nn

import fxqfix
from fxqfix._reasons import innermost
from fxqfix.errors import RouteError
from tests.routes.small import rows


def _wrapped(*messages: str, suppressed: bool = False) -> BaseException:
    error: BaseException = ValueError(messages[0])
    for message in messages[1:]:
        with pytest.raises(RuntimeError) as outer:
            _wrap(error, message, suppressed)
        error = outer.value
    return error


def _wrap(error: BaseException, message: str, suppressed: bool) -> None:
    try:
        raise error
    except Exception as inner:
        if suppressed:
            raise RuntimeError(message) from None
        raise RuntimeError(message) from inner


@pytest.mark.parametrize("suppressed", [False, True])
def test_the_first_reason(suppressed: bool) -> None:
    error = _wrapped("int16 is not taken", "step 2 failed:", "export failed", suppressed=suppressed)
    assert innermost(error) == "ValueError: int16 is not taken"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\x1b[96mThis is step 3/3\x1b[0m of it.\nmore", "This is step 3/3 of it"),
        ("backend='inductor' raised:\nit has no kernel\n\nSet VERBOSE", "it has no kernel"),
        (f"Load model from {tempfile.gettempdir()}/tmp0j97l3v0/m.onnx failed", None),
    ],
)
def test_one_line(text: str, line: str | None) -> None:
    assert innermost(ValueError(text)) == f"ValueError: {line or 'Load model from m.onnx failed'}"


def test_an_assertion_without_words_says_where_it_stands() -> None:
    def refuses(dtype: str) -> None:
        assert dtype == "float32"

    with pytest.raises(AssertionError) as error:
        refuses("float16")
    error.value.args = ()
    assert innermost(error.value) == 'AssertionError in refuses: assert dtype == "float32"'


def test_a_circle_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__context__ = second, first
    assert innermost(first).startswith("ValueError: ")


class Strange(nn.Module):
    """An op that ONNX has not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.special.i0e(self.first(x)))


def test_routes_say_the_same_again_and_after_others() -> None:
    pytest.importorskip("onnxscript", reason="the route needs it")
    pytest.importorskip("onnxruntime", reason="the route needs it")
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    prepared = prepare_fx(Strange().eval(), get_default_qconfig_mapping("fbgemm"), (rows(),))
    prepared(rows())
    said = []
    for _ in range(2):
        with pytest.raises(RouteError, match="No ONNX function found for") as refused:
            fxqfix.certify(prepared, "onnxruntime", [rows()])
        said.append(str(refused.value))
        assert "\x1b" not in said[-1]
        assert str(tempfile.gettempdir()) not in said[-1]
        fxqfix.certify(prepared, "export", [rows()])
    assert said[0] == said[1]
