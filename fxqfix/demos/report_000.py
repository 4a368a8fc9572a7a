"""Reports 000 and 001: a convolution with the identity, and code 127 comes twice.

https://github.com/mylesDoyle/DebugTorchQuantization
"""

from __future__ import annotations

import copy
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from fxqfix.demos._replay import (
    calls,
    causes,
    differing,
    paragraph,
    replay,
    shorten,
    supports,
    title,
)
from fxqfix.names import Engine
from fxqfix.qparams import quantize
from fxqfix.report import Report

__all__ = ["FooConv1x1", "convert", "expected_codes", "in_pairs", "models", "run"]

ENGINE: Engine = "fbgemm"  # as in the report, which names qnnpack too
K = 1.0

# As the report spells it; mypy sees no names in there.
quantization: Any = torch.quantization


class CustomQConfigs:
    """The report's: per tensor everywhere, the weights symmetric."""

    @staticmethod
    def get_default_qconfig() -> Any:
        """Fused fake-quants; activations on [0,255], weights on [-128,127]."""
        return quantization.QConfig(
            activation=quantization.FusedMovingAvgObsFakeQuantize.with_args(
                observer=quantization.MovingAverageMinMaxObserver,
                quant_min=0,
                quant_max=255,
                reduce_range=False,
            ),
            weight=quantization.FusedMovingAvgObsFakeQuantize.with_args(
                observer=quantization.MovingAverageMinMaxObserver,
                quant_min=-128,
                quant_max=127,
                dtype=torch.qint8,
                qscheme=torch.per_tensor_symmetric,
            ),
        )


class FooConv1x1(nn.Module):
    """The report's model: quantize, 1x1 convolution, relu, dequantize."""

    def __init__(self, set_qconfig: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, 1)
        self.act = nn.ReLU()
        self.quant = quantization.QuantStub(CustomQConfigs.get_default_qconfig())
        self.dequant: nn.Module = quantization.DeQuantStub()
        self.modules_to_fuse = [["conv", "act"]]
        if set_qconfig:
            self.qconfig = CustomQConfigs.get_default_qconfig()

    def forward(self, x: Tensor) -> Tensor:
        """Run the model."""
        x = self.quant(x)
        output_quant = self.act(self.conv(x))
        output: Tensor = self.dequant(output_quant)
        return output

    def fuse(self) -> FooConv1x1:
        """Fuse convolution and relu."""
        quantization.fuse_modules(self, self.modules_to_fuse, inplace=True)
        return self

    def set_weights(self, multiplier: float) -> None:
        """Set the bias to zero and the weights to k times the identity."""
        self.conv.bias = nn.Parameter(torch.zeros(3))
        self.conv.weight = nn.Parameter(multiplier * torch.eye(3).reshape(self.conv.weight.shape))


def set_qconfig_params(model_prepared: Any, k: float) -> None:
    """Hard-code the ranges, as the report does."""
    weight = model_prepared.conv.weight_fake_quant
    weight.scale = torch.Tensor([2.0 * k / 255.0])  # symmetric, hence multiplied by 2
    weight.activation_post_process.min_val = torch.tensor(0.0)
    weight.activation_post_process.max_val = torch.tensor(k)
    output = model_prepared.conv.activation_post_process
    output.scale = torch.Tensor([k / 255.0])
    output.activation_post_process.min_val = torch.tensor(0.0)
    output.activation_post_process.max_val = torch.tensor(k)
    stub = model_prepared.quant.activation_post_process
    stub.scale = torch.Tensor([1.0 / 255.0])
    stub.activation_post_process.min_val = torch.tensor(0.0)
    stub.activation_post_process.max_val = torch.tensor(1.0)


def models(k: float = K) -> tuple[nn.Module, Tensor]:
    """The prepared model of the report, and its input: 0 to 255 in every row, over 255."""
    data = torch.arange(0, 256).repeat(1, 3, 256, 1) / 255.0
    model = FooConv1x1(set_qconfig=True)
    model.set_weights(k)
    model.fuse()
    prepared: nn.Module = quantization.prepare_qat(model).train()
    prepared.eval()
    prepared.apply(quantization.disable_observer).eval()
    set_qconfig_params(prepared, k)
    return prepared, data


def convert(prepared: nn.Module) -> nn.Module:
    """Convert as torch does it, with the quantized tensor as output, as in the report."""
    copied: Any = copy.deepcopy(prepared)
    copied.dequant = nn.Identity()
    converted: nn.Module = quantization.convert(copied, inplace=False)
    return converted


def expected_codes(prepared: nn.Module, data: Tensor) -> Tensor:
    """The fake-quant model's output as codes of its own output grid."""
    from fxqfix import inspect

    used = inspect(prepared).site("conv").used
    assert used is not None  # a fake-quant always has qparams
    return quantize(calls(prepared, data), used)


def in_pairs(converted: Any, data: Tensor) -> Tensor:
    """Codes where products are added in pairs that saturate at 16 bits, as CPUs without VNNI do.

    Neighbouring input channels make a pair, on the raw codes; zero points are corrected after.

    Args:
        converted: The converted model, with its 1x1 convolution, zero bias and relu.
        data: Its input.
    """
    with torch.no_grad():
        codes = converted.quant(data)
    weight, conv = converted.conv.weight(), converted.conv
    products = codes.int_repr().int()[:, None] * weight.int_repr().int()[None]
    odd = nn.functional.pad(products, (0, 0, 0, 0, 0, 1))[:, :, 1::2]
    total = (products[:, :, ::2] + odd).clamp(-(2**15), 2**15 - 1).sum(2)
    total = total - weight.q_zero_point() * codes.int_repr().int().sum(1, keepdim=True)
    multiplier = torch.tensor(codes.q_scale() * weight.q_scale() / conv.scale)
    rounded: Tensor = torch.round(total * multiplier).int() + conv.zero_point
    return rounded.clamp(0, 255)


def run(out: TextIO) -> Report:
    """Write the story to `out`; the report is the one before the fix."""
    from fxqfix import compare

    with replay(ENGINE):
        prepared, data = models()
        converted = convert(prepared)
        expected = expected_codes(prepared, data)
        codes = calls(converted, data).int_repr().int()
        title(out, f"Reports 000, 001: code 127 comes twice ({ENGINE})")
        print("1. What they saw: the identity on 0..255, first row of channel 0", file=out)
        _show(out, "fake-quant", expected)
        _show(out, "int8", codes, expected)
        report = compare(prepared, converted, [data], engine=ENGINE)
        print(f"\n2. compare(prepared, converted, data)\n{report}", file=out)
        print("\n3. Why", file=out)
        _why(out, report)
        print("\n4. After freeze(prepared), then torch's own convert", file=out)
        _after(out, prepared, data, expected)
    return report


def _show(out: TextIO, name: str, codes: Tensor, expected: Tensor | None = None) -> None:
    rows = codes.reshape(-1, codes.shape[-1])
    found = sorted({row.unique().numel() for row in rows})
    different = " to ".join(str(n) for n in dict.fromkeys((found[0], found[-1])))
    count = "" if expected is None else f", {differing(codes, expected)} of {codes.numel()} wrong"
    print(f"   {name:12} {shorten(rows[0], 128)}", file=out)
    print(f"{'':15} {different} different codes a row{count}", file=out)


def _why(out: TextIO, report: Report) -> None:
    weight, output = report.row("conv.weight"), report.row("conv").cumulative
    ran, baked = weight.grids
    paragraph(
        out,
        f"The fused fake-quant kernel ran {weight.name} with scale {ran.scales[0]:.6g}, zero point "
        f"{ran.zero_points[0]}: it does not make a range of one sign symmetric.",
        f"Conversion asked the Python observer, which says {baked.scales[0]:.6g}, "
        f"{baked.zero_points[0]}.",
        f"There the highest code, {baked.quant_max}, stands for "
        f"{baked.quant_max * baked.scales[0]:.4f}: the weight {K} becomes that, and "
        f"{output.differing} of {output.elements} outputs come out {output.max_lsb} code lower.",
        f"Causes: {causes(report)}.",
    )


def _after(out: TextIO, prepared: nn.Module, data: Tensor, expected: Tensor) -> None:
    from fxqfix import compare, freeze

    engines: tuple[Engine, ...] = (ENGINE, "qnnpack")
    for engine in filter(supports, engines):
        with replay(engine):
            frozen = freeze(prepared)
            converted = convert(frozen)
            codes = calls(converted, data).int_repr().int()
            report = compare(frozen, converted, [data], engine=engine)
        _show(out, f"int8 {engine}", codes, expected)
        if report.exact:
            continue
        print(f"{'':15} causes: {causes(report)}", file=out)
        if torch.equal(codes, in_pairs(converted, data)):
            print(f"{'':15} code for code what pairs of products saturating at 16 bits", file=out)
            print(f"{'':15} give: a CPU without VNNI, a qconfig without reduce_range", file=out)
