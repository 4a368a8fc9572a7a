"""Report 003: simulating with quant_max 127 never matches convert_fx, only 255 does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization.backend_config.fbgemm import get_fbgemm_backend_config
from torch.ao.quantization.qconfig import get_default_qat_qconfig
from torch.ao.quantization.qconfig_mapping import QConfigMapping
from torch.ao.quantization.quantize_fx import (
    convert_fx,
    convert_to_reference_fx,
    prepare_qat_fx,
)

from fxqfix.demos._replay import calls, causes, differing, paragraph, quantized_codes, replay, title
from fxqfix.names import Engine
from fxqfix.report import Report

__all__ = ["Case", "Debug", "Simulation", "cases", "convert", "models", "run", "simulate"]

ENGINE: Engine = "x86"  # the report prints it as its default
SEED = 4  # the report's
NETS = INPUTS = 10


class Debug(nn.Module):
    """The report's model: one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_debug = nn.Conv2d(3, 5, kernel_size=(3, 3), padding=0, stride=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Run the model."""
        output: Tensor = self.conv_debug(x)
        return output


def quantize_per_tensor_uint8(
    x_fp32: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    reciprocal: bool = False,
) -> Tensor:
    """The report's own quantize; with `reciprocal`, it multiplies by 1 / scale, as torch does."""
    x = torch.round(x_fp32 * (1.0 / scale) if reciprocal else x_fp32 / scale).to(torch.int32)
    return torch.clamp(x + zero_point, quant_min, quant_max).to(dtype=torch.uint8)


def dequantize_per_tensor_uint8(x_i8: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The report's own dequantize."""
    return ((x_i8.to(torch.float32) - zero_point) * scale).to(dtype=torch.float32)


@dataclass(frozen=True)
class Simulation:
    """What the report's arithmetic gives: the codes of input and output, the output's values."""

    input_quant: Tensor
    output_quant: Tensor
    output_dequant: Tensor

    @property
    def codes(self) -> Tensor:
        """All codes, in the order in which the model makes them."""
        return torch.cat([self.input_quant.flatten(), self.output_quant.flatten()])


def simulate(
    converted: fx.GraphModule, x: Tensor, q_max: int, reciprocal: bool = False
) -> Simulation:
    """The report's simulation of a converted model: parameters out of its state_dict.

    Args:
        converted: What convert_fx returned.
        x: An input.
        q_max: 127 or 255.
        reciprocal: Multiply by 1 / scale instead of dividing: the two differ on ties.
    """
    state = converted.state_dict()
    weight, bias = state["conv_debug.weight"], state["conv_debug.bias"]
    scale, point = state["conv_debug_input_scale_0"], state["conv_debug_input_zero_point_0"]
    out_scale, out_point = state["conv_debug.scale"], state["conv_debug.zero_point"]
    input_quant = quantize_per_tensor_uint8(x, scale, point, 0, q_max, reciprocal)
    input_dequant = dequantize_per_tensor_uint8(input_quant, scale, point)
    result = F.conv2d(input_dequant, weight.dequantize(), bias.detach(), 1, 0, 1, 1)
    output_quant = quantize_per_tensor_uint8(result, out_scale, out_point, 0, q_max, reciprocal)
    output_dequant = dequantize_per_tensor_uint8(output_quant, out_scale, out_point)
    return Simulation(input_quant.int(), output_quant.int(), output_dequant)


@dataclass(frozen=True)
class Case:
    """A random net of the report, prepared and converted, and its inputs."""

    prepared: fx.GraphModule
    converted: fx.GraphModule
    reference: fx.GraphModule
    data: list[Tensor]


def qconfig_mapping() -> QConfigMapping:
    """The report's: fbgemm's default, whose activations have reduce_range."""
    qconfig: Any = get_default_qat_qconfig("fbgemm")  # type: ignore[no-untyped-call]  # of torch
    return QConfigMapping().set_global(qconfig)


def models() -> tuple[fx.GraphModule, list[Tensor]]:
    """One random net, prepared and run on two batches, and its inputs: from the random state."""
    net = Debug().train()
    example = (torch.randn(1, 3, 10, 10),)
    prepared = prepare_qat_fx(
        net, qconfig_mapping(), example, backend_config=get_fbgemm_backend_config()
    )
    for _ in range(2):
        prepared(torch.randn(1, 3, 10, 10))
    return prepared, [torch.randn(1, 3, 10, 10) for _ in range(INPUTS)]


def convert(prepared: nn.Module, to: Any = convert_fx) -> fx.GraphModule:
    """Convert a copy as torch does it, to int8 or by another function to a reference model."""
    converted: fx.GraphModule = to(
        copy.deepcopy(prepared),
        qconfig_mapping=qconfig_mapping(),
        backend_config=get_fbgemm_backend_config(),
    )
    return converted


def cases(nets: int = NETS) -> Iterator[Case]:
    """The report's loop: a new random net each time."""
    for _ in range(nets):
        prepared, data = models()
        reference = convert(prepared, convert_to_reference_fx)
        yield Case(prepared, convert(prepared), reference, data)


def run(out: TextIO) -> Report:
    """Write the story to `out`; the report is that of the net with most codes above 127."""
    from fxqfix import compare

    with replay(ENGINE, SEED):
        found = list(cases())
        title(out, f"Report 003: only quant_max 255 matches convert_fx ({ENGINE})")
        _saw(out, found)
        reports = [compare(c.prepared, c.converted, c.data, engine=ENGINE) for c in found]
        above = [sum(row.cumulative.out_of_range for row in r.rows) for r in reports]
        worst = reports[above.index(max(above))]
        print("\n2. compare(prepared, convert_fx(prepared), data) of the worst net", file=out)
        print(worst, file=out)
        print("\n3. Why", file=out)
        _why(out, worst, above)
        print("\n4. After to_decomposed(prepared)", file=out)
        _after(out, found)
    return worst


def _saw(out: TextIO, found: list[Case]) -> None:
    print(f"1. What they saw: {len(found)} nets, {INPUTS} inputs each, simulated by hand", file=out)
    for q_max in (127, 255):
        wrong: list[int] = []
        total = 0
        for case in found:
            apart = 0
            for x in case.data:
                expected = calls(case.reference, x)
                apart += differing(expected, simulate(case.converted, x, q_max).output_dequant)
                total += expected.numel()
            wrong.append(apart)
        print(
            f"   clamped at {q_max}: {sum(not w for w in wrong)} nets match the converted model, "
            f"{sum(wrong)} of {total} outputs differ",
            file=out,
        )


def _why(out: TextIO, report: Report, above: list[int]) -> None:
    declared, converted = report.rows[0].grids
    paragraph(
        out,
        "fbgemm's default qconfig has reduce_range: the prepared model holds every activation in "
        f"{declared.range_text}.",
        "convert_fx writes quantize_per_tensor(x, scale, zero_point, dtype), which has no place "
        f"for the range, so the converted model goes to {converted.range_text}.",
        f"Codes above {declared.quant_max}, net by net: {', '.join(map(str, above))}.",
        f"Causes in the table's net: {causes(report)}.",
    )


def _after(out: TextIO, found: list[Case]) -> None:
    from fxqfix import freeze, to_decomposed

    by_hand = divided = total = by_frozen = outputs = 0
    for case in found:
        decomposed, frozen = to_decomposed(case.prepared), freeze(case.prepared)
        parameters = convert(frozen)
        for x in case.data:
            codes = torch.cat([c.flatten() for c in quantized_codes(decomposed, x).values()])
            by_hand += differing(codes, simulate(parameters, x, 127, reciprocal=True).codes)
            divided += differing(codes, simulate(parameters, x, 127).codes)
            total += codes.numel()
            output = calls(decomposed, x)
            by_frozen += differing(output, calls(frozen, x))
            outputs += output.numel()
    print(f"   {by_frozen} of {outputs} outputs differ from the frozen prepared model", file=out)
    print(f"   {by_hand} of {total} codes differ from the simulation clamped at 127", file=out)
    paragraph(
        out,
        f"({divided} differ where it divides by the scale, as the report does: torch multiplies by "
        "1 / scale, and the two round a few ties differently.)",
    )
    print("   The range stands in the graph, for an engine of one's own:", file=out)
    for line in to_decomposed(found[0].prepared).code.splitlines():
        if "decomposed.quantize_per_tensor" in line:
            print(f"     {line.partition(';')[0].strip().replace('torch.ops.', '')}", file=out)
