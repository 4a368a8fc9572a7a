"""Devices that are wrong on purpose, and how well `judge` names it.

`python -m tests.deviations.planted` plants every fault in every architecture, alone and in pairs,
and prints recall and precision.

A plant counts where it changes a code. It is recalled where the set that is named holds it; of a
pair, where the set holds the pair, or one of the two that alone gives the same codes. A name is
precise where all that the set names give the device's codes: that is asked of the device's codes,
and not of what judge says.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from fxqfix import Judgement, OpParameters, Parameters, extract_parameters, judge
from fxqfix._torch import quantized_engine
from fxqfix.export import Reference
from tests.deviations import engine
from tests.engines.nets import NETS, SHAPES

__all__ = ["ARCHITECTURES", "Device", "device", "main", "plant", "recalled", "weights_of"]

ARCHITECTURES = ("PlainCNN", "Residual", "Mobile", "Inception", "VGGWide", "UNet")
_WEIGHTS = {
    "channel": PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric
    ),
    "affine": MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_affine),
}


@dataclass(frozen=True, eq=False)
class Device:
    """A model's parameters and an input."""

    parameters: Parameters
    x: Tensor

    def run(self, planted: dict[str, frozenset[str]]) -> dict[str, Tensor]:
        """What the device gives: planted ops by NumPy, the others as they are due."""
        have: dict[str, Tensor] = {self.parameters.inputs[0]: self.x}
        given = dict(have)
        for op in self.parameters:
            inputs = [have[name] for name in op.inputs]
            reference = Reference(op, self.parameters.arithmetic)
            found = reference.run(*inputs)
            if op.name in planted:
                arrays = [x.numpy() for x in inputs]
                faults, others = planted[op.name], list(self.parameters)
                wrong = engine.compute(op, arrays, faults, others)
                assert wrong.shape == tuple(found.shape)
                given[op.name] = torch.from_numpy(wrong.copy()).to(torch.int32)
                # It knows in which form it dumped its own codes.
                own = engine.compute(op, arrays, faults - engine.FORMS, others)
                have[op.name] = torch.empty_like(found).copy_(torch.from_numpy(own.copy()))
            else:
                have[op.name] = given[op.name] = found
        return given


@functools.cache
def device(name: str, weights: str = "channel") -> Device:
    """A small architecture for qnnpack."""
    torch.manual_seed(3)
    shape = SHAPES.get(name, (4, 3, 16, 16))
    x = torch.randn(shape)
    activation = HistogramObserver.with_args(dtype=torch.quint8)
    mapping = get_default_qconfig_mapping("qnnpack")
    mapping.set_global(QConfig(activation, _WEIGHTS[weights]))
    if name == "UNet" or weights == "channel":
        mapping.set_object_type(nn.ConvTranspose2d, QConfig(activation, _WEIGHTS["affine"]))
    with quantized_engine("qnnpack"):
        prepared = prepare_fx(_shifted(NETS[name]()).eval(), mapping, (x,))
        prepared(x)
        parameters = extract_parameters(convert_fx(prepared))
    return Device(parameters, x)


def _shifted(net: nn.Module) -> nn.Module:
    """Statistics and biases of a net that was trained: no bias is near zero."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.3)
    return net


def weights_of(fault: str) -> str:
    return "affine" if fault == "weight-zero-point-missing" else "channel"


def _fits(op: OpParameters, fault: str) -> bool:
    conv = engine.key(op) == "conv2d"
    square = conv and op.weight.shape[2] == op.weight.shape[3] > 1
    if fault in ("kernel-flipped", "kernel-transposed"):
        return square
    if fault == "weight-layout":
        return conv
    if fault == "linear-transposed":
        return engine.key(op) == "linear"
    if fault == "relu-missing":
        return op.op.endswith("_relu")
    if fault == "relu-added":
        return not op.op.endswith("_relu")
    if fault == "padding-with-zero":
        return conv and any(op.options["padding"])
    if fault == "padding-counted":
        return any(op.options.get("padding", ()))
    if fault in ("input-layout", "output-layout"):
        return engine.key(op) not in ("linear",)
    return True


@functools.cache
def _healthy(found: Device) -> dict[str, Tensor]:
    return found.run({})


def sites(found: Device, *faults: str) -> Iterator[OpParameters]:
    """Ops at which all of the faults mean something."""
    for op in found.parameters:
        # Other weights follow from the codes where there are enough of them for each.
        few = op.weight is not None and _healthy(found)[op.name].numel() < 32 * op.weight.numel()
        if "stale-weights" in faults and few:
            continue
        if op.output is not None and all(engine.applies(op, f) and _fits(op, f) for f in faults):
            yield op


@functools.cache
def plant(name: str, *faults: str) -> tuple[OpParameters, dict[str, Tensor], Judgement] | None:
    """The first op whose codes the faults change, the dump, and what is said of it."""
    found = device(name, weights_of(faults[0]))
    healthy = _healthy(found)
    for op in sites(found, *faults):
        try:
            answers = found.run({op.name: frozenset(faults)})
        except (StopIteration, ValueError, IndexError, AssertionError):
            continue
        if not torch.equal(answers[op.name].int(), healthy[op.name].int()):
            return op, answers, judge(found.parameters, answers)
    return None


def recalled(found: Judgement, name: str, op: OpParameters, faults: tuple[str, ...]) -> bool:
    named = [set(e.deviations) for e in found.op(op.name).named]
    if set(faults) in named:
        return True
    device_ = device(name, weights_of(faults[0]))
    both = device_.run({op.name: frozenset(faults)})[op.name]
    for fault in faults if len(faults) > 1 else ():
        alone = device_.run({op.name: frozenset({fault})})[op.name]
        if {fault} in named and torch.equal(alone, both):
            return True
    return False


def singles(only: str = "") -> Iterator[tuple[str, str, bool, str]]:
    """(fault, architecture, recalled, what was named)."""
    for fault, name in itertools.product(engine.FAULTS, ARCHITECTURES):
        if only and only not in (fault, name):
            continue
        found = plant(name, fault)
        if found is None:
            continue
        op, _, judgement = found
        said = " or ".join("+".join(e.deviations) for e in judgement.op(op.name).named)
        yield fault, name, recalled(judgement, name, op, (fault,)), f"{op.op}: {said}"


def pairs(step: int = 7) -> Iterator[tuple[tuple[str, str], str, bool, str]]:
    """The same of pairs: every `step`-th, over the architectures in turn."""
    all_pairs = itertools.combinations(engine.WEIGHTED, 2)
    for index, faults in enumerate(itertools.islice(all_pairs, 0, None, step)):
        if _same_place(*faults):
            continue
        name = ARCHITECTURES[index % len(ARCHITECTURES)]
        found = plant(name, *faults)
        if found is None:
            continue
        op, _, judgement = found
        said = " or ".join("+".join(e.deviations) for e in judgement.op(op.name).named)
        yield faults, name, recalled(judgement, name, op, faults), f"{op.op}: {said[:200]}"


_PLACES = (
    (
        *("half-up", "half-away", "truncation", "rounds-down", "float32-multiplier"),
        *("float64-multiplier", "int32-multiplier", "int32-multiplier-rounded-twice"),
        *("int15-multiplier", "int15-multiplier-rounded-twice", "power-of-two-multiplier"),
    ),
    tuple(f for f in engine.WEIGHTED if f.startswith("bias-")),
    ("per-tensor-multiplier", "permuted-multipliers"),
    ("accumulator-wraps", "accumulator-saturates", "adds-saturate"),
    ("clamps-to-int8", "wraps-around"),
    (
        *("weight-layout", "kernel-flipped", "kernel-transposed", "linear-transposed"),
        *("output-channels-permuted", "weights-of-another-op", "stale-weights"),
    ),
)


def _same_place(a: str, b: str) -> bool:
    """Whether an engine can't have both: they are two ways to do one thing."""
    return any(a in place and b in place for place in _PLACES)


def main(what: str = "all", only: str = "") -> int:
    """Print what is missed, then recall."""
    failed = 0
    for title, made in (("single", lambda: singles(only)), ("pairs", lambda: pairs())):
        if what not in ("all", title):
            continue
        start, count, recalled, kinds = time.perf_counter(), 0, 0, set()
        for fault, name, good, said in made():
            count, recalled = count + 1, recalled + good
            kinds.add(fault)
            if not good or only:
                print(f"{'ok' if good else 'MISSED'} {fault} in {name}: {said}")
        seconds = time.perf_counter() - start
        print(f"{title}: {recalled} of {count} recalled, {len(kinds)} kinds, {seconds:.0f} s")
        failed += count - recalled
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
