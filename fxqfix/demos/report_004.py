"""Report 004: are integers used at all, where does the memory go, and how to replicate forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix.demos._replay import causes, differing, paragraph, replay, title
from fxqfix.dialects.site import Inspection
from fxqfix.names import Engine
from fxqfix.report import Report

__all__ = ["Forward", "M", "convert", "forward", "integers", "models", "run"]

ENGINE: Engine = "fbgemm"
SEED = 1  # the report draws anew each time; here the output has zeros and large codes, as there

# As the report spells it; mypy sees no names in there.
quantization: Any = torch.quantization


class M(nn.Module):
    """The report's model, from PyTorch's own documentation."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = quantization.QuantStub()
        self.conv = nn.Conv2d(1, 1, 1)
        self.relu = nn.ReLU()
        self.dequant = quantization.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        """Run the model."""
        x = self.quant(x)
        x = self.conv(x)
        x = self.relu(x)
        output: Tensor = self.dequant(x)
        return output


def models() -> tuple[nn.Module, Tensor]:
    """The calibrated model of the report and its input, both from the random state."""
    model: Any = M()
    model.eval()
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    prepared: nn.Module = quantization.prepare(quantization.fuse_modules(model, [["conv", "relu"]]))
    data = torch.randn(4, 1, 4, 4)
    prepared(data)
    return prepared, data


def convert(prepared: nn.Module) -> Any:
    """Convert, as torch does it."""
    return quantization.convert(prepared)


@dataclass(frozen=True)
class Forward:
    """What the report's hooks catch: quantized input and output of the convolution."""

    input: Tensor
    output: Tensor


def forward(converted: Any, x: Tensor) -> Forward:
    """Run the converted model and catch what enters and leaves its convolution."""
    caught: list[Forward] = []
    hook = converted.conv.register_forward_hook(
        lambda module, inputs, output: caught.append(Forward(inputs[0], output))
    )
    with torch.no_grad():
        converted(x)
    hook.remove()
    return caught[0]


@dataclass(frozen=True)
class Integers:
    """Forward in integers: the int32 accumulator, the multiplier per channel, the codes."""

    accumulator: Tensor
    multiplier: Tensor
    codes: Tensor


def integers(conv: Any, x: Tensor) -> Integers:
    """Replicate a quantized ConvReLU2d from int_repr(), to the code, by fbgemm's arithmetic.

    Args:
        conv: The converted module, with weights per channel and a bias.
        x: Its quantized input.

    Returns:
        The accumulator ``sum((q - zp) * w)``, an int32; the float32 multiplier
        ``x_scale * w_scale / out_scale``; and the codes
        ``rne((acc + bias / (x_scale * w_scale)) * multiplier) + zp``, clamped to [zp, 255].
    """
    weight, bias = conv.weight(), conv.bias().detach()
    q = x.int_repr().to(torch.int32) - x.q_zero_point()
    accumulator = F.conv2d(q, weight.int_repr().to(torch.int32))
    scales = (x.q_scale() * weight.q_per_channel_scales()).reshape(1, -1, 1, 1)  # doubles
    multiplier = (scales / conv.scale).float()
    shifted = accumulator.float() + (bias.reshape(1, -1, 1, 1) / scales).float()
    codes = torch.round(shifted * multiplier).int() + conv.zero_point
    return Integers(accumulator, multiplier, codes.clamp(conv.zero_point, 255))  # relu: from zp


def run(out: TextIO) -> Report:
    """Write the story to `out`; the report compares the calibrated and the converted model."""
    from fxqfix import compare, inspect

    with replay(ENGINE, SEED):
        prepared, data = models()
        converted = convert(prepared)
        seen = forward(converted, data)
        report = compare(prepared, converted, [data], engine=ENGINE)
        found = inspect(converted)
        title(out, f"Report 004: are the integers used? ({ENGINE})")
        _saw(out, converted, seen)
        print(f"\n2. compare(prepared, converted, data)\n{report}", file=out)
        print(f"\n   inspect(converted)\n{found}", file=out)
        print("\n3. Why", file=out)
        _why(out, found, seen, converted)
        _compared(out, report)
        print("\n4. forward() from int_repr() alone", file=out)
        _after(out, converted, seen, data)
    return report


def _saw(out: TextIO, converted: Any, seen: Forward) -> None:
    weight, conv = converted.conv.weight(), converted.conv
    real = seen.input.dequantize() * weight.dequantize() + conv.bias().detach()
    by_hand = torch.relu(torch.round(real / conv.scale)).int()
    product = seen.input.int_repr().int() * weight.int_repr().int()
    wrong = differing(by_hand, seen.output.int_repr())
    print("1. What they saw", file=out)
    print(f"   the weight prints as {weight.dequantize().item():.6f}, a float", file=out)
    print(f"   floats by hand give the output: {wrong} of {by_hand.numel()} codes differ", file=out)
    print(
        f"   int_repr() times int_repr() does not fit 8 bits: up to {product.abs().max()}", file=out
    )


def _why(out: TextIO, found: Inspection, seen: Forward, converted: Any) -> None:
    result = integers(converted.conv, seen.input)
    as_float, as_codes = found.weight_bytes
    held, weight = seen.input.int_repr(), converted.conv.weight().int_repr()
    kinds = [str(t.dtype).removeprefix("torch.") for t in (held, weight, result.accumulator)]
    paragraph(
        out,
        f"Printing a quantized tensor dequantizes it; what is stored is {kinds[0]} (input) and "
        f"{kinds[1]} (weight).",
        f"The kernel adds their products up in {kinds[2]}, here {result.accumulator.min()} to "
        f"{result.accumulator.max()}, and one multiplier a channel, here "
        f"{result.multiplier.item():.6g}, takes that back to codes {result.codes.min()} to "
        f"{result.codes.max()}: floats and integers give the same numbers because one is the "
        "other times a scale.",
        f"Memory: weights {as_float} -> {as_codes} bytes, the convolution's input "
        f"{4 * held.numel()} -> {held.numel()} bytes.",
    )


def _compared(out: TextIO, report: Report) -> None:
    row = report.row("conv")
    local = row.local or row.cumulative
    paragraph(
        out,
        f"On the same inputs {local.differing} of {local.elements} codes of {row.name} differ; "
        f"{row.cumulative.differing} differ from the calibrated model, which only observes its "
        f"input and computes in float. Causes: {causes(report)}.",
    )


def _after(out: TextIO, converted: Any, seen: Forward, data: Tensor) -> None:
    larger = forward(converted, data.repeat(1, 1, 8, 8) * torch.linspace(0.1, 2.0, 32))
    for name, case in (("the report's input", seen), ("32x32, up to 2x larger", larger)):
        wrong = differing(integers(converted.conv, case.input).codes, case.output.int_repr())
        print(f"   {name}: {wrong} of {case.output.numel()} codes differ", file=out)
