"""Report 002: negative codes come out of QuantStub as 0."""

from __future__ import annotations

from typing import Any, TextIO

import torch
from torch import Tensor, nn

from fxqfix.demos._replay import (
    calls,
    causes,
    differing,
    paragraph,
    quantized_codes,
    replay,
    shorten,
    title,
)
from fxqfix.names import Engine
from fxqfix.qparams import QParams
from fxqfix.report import Report, Row

__all__ = ["M_only_quant_dequant", "convert", "manual_codes", "models", "run"]

ENGINE: Engine = "fbgemm"

# The qparams behind every value that the report prints. The histogram search of a newer torch picks
# other ones for the same input, where no code would be negative.
REPORT_SCALE, REPORT_ZERO_POINT = 0.01696838065981865, 34

# As the report spells it; mypy sees no names in there.
quantization: Any = torch.quantization


class M_only_quant_dequant(nn.Module):
    """The report's model: quantize and dequantize."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = quantization.QuantStub()
        self.dequant = quantization.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        """Run the model."""
        x = self.quant(x)
        output: Tensor = self.dequant(x)
        return output


def report_input() -> Tensor:
    """The report's input, digit by digit."""
    rows = [
        [0.95466703176498413086, -0.136212718486785888672,
         0.75253891944885253906, 1.57104063034057617188],
        [0.97250884771347045898, -0.67004448175430297852,
         -0.58047348260879516602, 1.30683445930480957031],
        [-0.13423979282379150391, 0.16391958296298980713,
         -0.71688455343246459961, 0.05846109613776206970],
        [1.07569837570190429688, -0.06351475417613983154,
         -0.19469638168811798096, -0.09430617839097976685],
    ]  # fmt: skip
    return torch.tensor([[rows]])


def models(as_in_report: bool = True) -> tuple[nn.Module, Tensor]:
    """The calibrated model and its input.

    Args:
        as_in_report: Hold the qparams of the report, whose torch was older, instead of those that
            this torch's HistogramObserver picks.
    """
    data = report_input()
    model: Any = M_only_quant_dequant()
    model.eval()
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    prepared: Any = quantization.prepare(model)
    prepared(data)
    if as_in_report:
        observer = prepared.quant.activation_post_process
        fixed: Any = torch.ao.quantization.FixedQParamsObserver
        prepared.quant.activation_post_process = fixed(
            scale=REPORT_SCALE,
            zero_point=REPORT_ZERO_POINT,
            quant_min=observer.quant_min,
            quant_max=observer.quant_max,
        )
    return prepared, data


def convert(prepared: nn.Module) -> Any:
    """Convert, as torch does it."""
    return quantization.convert(prepared)


def manual_codes(x: Tensor, qparams: QParams, clamped: bool = True) -> Tensor:
    """The report's formula, by hand; the answer in the thread adds the clamp."""
    codes = torch.round(x.detach() / qparams.scales[0]) + qparams.zero_points[0]
    if clamped:
        codes = torch.clamp(codes, qparams.quant_min, qparams.quant_max)
    return codes.int()


def run(out: TextIO) -> Report:
    """Write the story to `out`; the report compares the input and the same 1.5 times larger."""
    from fxqfix import compare

    with replay(ENGINE):
        prepared, data = models()
        converted = convert(prepared)
        batches = [data, 1.5 * data]
        report = compare(prepared, converted, batches, engine=ENGINE)
        title(out, f"Report 002: negative codes come out as 0 ({ENGINE})")
        row = report.rows[0]
        _saw(out, row, data, converted)
        print(f"\n2. compare(prepared, converted, [x, 1.5 * x])\n{report}", file=out)
        print("\n3. Why", file=out)
        _why(out, row, converted.quant(1.5 * data).int_repr().int(), causes(report))
        print("\n4. After to_decomposed(prepared)", file=out)
        _after(out, prepared, row, batches)
    return report


def _saw(out: TextIO, row: Row, data: Tensor, converted: Any) -> None:
    by_hand = manual_codes(data, row.grids[0], clamped=False)
    stub = converted.quant(data).int_repr().int()
    where = by_hand != stub
    print("1. What they saw: round(x / scale) + zero_point against QuantStub", file=out)
    print(f"   x          {shorten(data[where])}", file=out)
    print(f"   by hand    {shorten(by_hand[where])}", file=out)
    print(f"   QuantStub  {shorten(stub[where])}", file=out)
    print(f"   the other {int((~where).sum())} of {where.numel()} codes agree", file=out)


def _why(out: TextIO, row: Row, larger: Tensor, counts: str) -> None:
    declared, held = row.grids
    (low, high), top = held.container, declared.quant_max
    paragraph(
        out,
        f"Quantizing ends in a clamp to [quant_min, quant_max], here {declared.range_text}; "
        "the formula by hand has none.",
        f"The converted model clamps to its container, {held.range_text}: the same at "
        f"the low end, since both begin at {low}, but not at the high end.",
        f"1.5 * x gives the codes {shorten(larger[larger > top])}, which the prepared model holds "
        f"at {top} and the container only at {high}.",
        f"Codes out of range: {row.cumulative.out_of_range} of {row.cumulative.elements}.",
        f"Causes: {counts}.",
    )


def _after(out: TextIO, prepared: nn.Module, row: Row, batches: list[Tensor]) -> None:
    from fxqfix import to_decomposed

    decomposed, grid = to_decomposed(prepared), row.grids[0]
    for name, x in zip(("x", "1.5 * x"), batches, strict=True):
        (codes,) = quantized_codes(decomposed, x).values()
        by_hand = manual_codes(x, grid)
        same_values = torch.equal(
            calls(decomposed, x), (by_hand - grid.zero_points[0]) * grid.scales[0]
        )
        print(
            f"   {name:8} {differing(codes, by_hand)} of {codes.numel()} codes differ from the "
            f"formula with the clamp, codes {codes.min()}..{codes.max()},\n{'':12}"
            f"dequantized values are equal: {same_values}",
            file=out,
        )
