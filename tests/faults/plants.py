"""One plant per cause: it puts the cause at a chosen site of any architecture.

A plot starts healthy: a frozen, folded prepared model, and a copy of it (`baked`) that conversion
gets. A plant swaps quantizers or modules of either, or edits the converted graph; whatever differs
then is the planted fault's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.ao.quantization import FakeQuantize, FusedMovingAvgObsFakeQuantize
from torch.ao.quantization.observer import (
    FixedQParamsObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)

from fxqfix import dialects
from fxqfix.dialects import Tap
from fxqfix.dialects.quantizer import read_quantizer
from fxqfix.dialects.weights import prepared_weight
from fxqfix.passes import FrozenFakeQuantize
from fxqfix.qparams import QParams
from tests.faults.zoo import ENGINES, Base, convert

__all__ = ["PLANTS", "Collision", "Plot", "places"]

Edit = Callable[[fx.GraphModule], None]


class Collision(Exception):
    """Two faults at one site."""


@dataclass
class Plot:
    """A pair of models on its way to be faulty.

    Attributes:
        base: The healthy architecture.
        engine: Engine to convert to; None for the decomposed form.
        prepared: What is compared.
        baked: What is converted.
        edits: Done on the converted graph.
        batch: The data.
        planted: Cause -> rows that may name it: where its codes can differ. One of them has to.
        touched: Sites and weights where a fault sits.
        gone: Sites that the converted model lacks: they have no row.
    """

    base: Base
    engine: str | None = None
    prepared: fx.GraphModule = field(init=False)
    baked: fx.GraphModule = field(init=False)
    edits: list[Edit] = field(default_factory=list)
    batch: torch.Tensor = field(init=False)
    planted: dict[str, set[str]] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Start healthy."""
        self.prepared = copy.deepcopy(self.base.frozen)
        self.baked = copy.deepcopy(self.base.frozen)
        self.batch = self.base.batch

    def converted(self) -> fx.GraphModule:
        """Convert what is baked, then edit."""
        model = convert(self.baked, self.engine)
        for edit in self.edits:
            edit(model)
        model.graph.lint()
        model.recompile()
        return model

    def swap(self, taps: list[Tap], prepared: nn.Module | None, baked: QParams | None) -> None:
        """Put a quantizer in place of the one that some sites share."""
        for tap in taps:
            path = str(tap.node.target)
            if prepared is not None:
                _put(self.prepared, path, prepared)
            if baked is not None:
                _put(self.baked, path, FrozenFakeQuantize(baked))

    def name(self, cause: str, rows: set[str], *sites: str) -> None:
        """Say which rows may name a cause, and where the fault sits, if elsewhere.

        Raises:
            Collision: Another fault sits there.
        """
        here = set(sites) or rows
        expected = set().union(*self.planted.values())
        if here & self.touched or self.gone & (rows | expected):
            raise Collision(sorted(here))
        self.touched |= here
        self.planted.setdefault(cause, set()).update(rows)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)


def _names(taps: list[Tap]) -> set[str]:
    return {tap.site.name for tap in taps}


def _used(tap: Tap) -> QParams:
    assert tap.site.used is not None
    return tap.site.used


def _range(q: QParams) -> tuple[float, float]:
    assert isinstance(q.scale, float)
    return (q.quant_min - q.zero_point) * q.scale, (q.quant_max - q.zero_point) * q.scale


def _plain(q: QParams, wider: float, fused: bool = False) -> Any:
    """A fake-quant of torch that uses `q`, its observer's range `wider` times as wide."""
    kind = FusedMovingAvgObsFakeQuantize if fused else FakeQuantize
    options = {"quant_min": q.quant_min, "quant_max": q.quant_max, "dtype": q.dtype}
    module: Any = kind(MovingAverageMinMaxObserver, **options)
    low, high = _range(q)
    module.activation_post_process.min_val.fill_(low * wider)
    module.activation_post_process.max_val.fill_(high * wider)
    module.scale.fill_(float(q.scales[0]))
    module.zero_point.fill_(int(q.zero_points[0]))
    module.disable_observer()
    return module.eval()


def _baked(module: nn.Module) -> QParams:
    found = read_quantizer(module).baked
    assert found is not None
    return found


def _alone(found: Base) -> list[list[Tap]]:
    """Sites whose quantizer is nobody else's, and that are computed from another one."""
    return [taps for taps in found.groups if len(taps) == 1 and found.inputs(taps[0])]


# ------------------------------------------------------------------------- other qparams


def stale_qparams(plot: Plot, place: int) -> None:
    """Buffers that were right, then an observer that saw more with the buffers held."""
    taps = plot.base.groups[place]
    module = _plain(_used(taps[0]), 1.4)
    plot.swap(taps, module, _baked(module))
    plot.name("stale-qparams", _names(taps))


def stale_buffers(plot: Plot, place: int) -> None:
    """Buffers that an exporter copied; the fused kernel goes by the observed range."""
    taps = plot.base.groups[place]
    module = _plain(_used(taps[0]), 1.0, fused=True)
    module.scale.mul_(0.75)
    held = QParams(
        float(module.scale),
        int(module.zero_point),
        _used(taps[0]).quant_min,
        _used(taps[0]).quant_max,
        module.dtype,
    )
    plot.swap(taps, module, held)
    plot.name("stale-qparams", _names(taps))


def moving_observer(plot: Plot, place: int) -> None:
    """Converted at one time; the observer, which is on, has moved since."""
    taps = plot.base.groups[place]
    module = _plain(_used(taps[0]), 1.0, fused=True)
    module.enable_observer()
    plot.swap(taps, module, _baked(_plain(_used(taps[0]), 0.7)))
    plot.name("moving-observer", _names(taps))


def moving_weight(plot: Plot, place: int) -> None:
    """Conversion shows a weight's observer, which is on, the weight once more."""
    path, node, tap = plot.base.weighted[place]
    owner: Any = plot.prepared.get_submodule(path)
    weight = owner.weight.detach()
    module: Any = FakeQuantize(
        MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=_used_axis(plot, path),
        averaging_constant=0.5,
    )
    module(weight * 0.6)
    owner.weight_fake_quant = module.eval()
    found = prepared_weight(owner, path)
    assert found is not None
    assert found[0].baked is not None
    other: Any = plot.baked.get_submodule(path)
    other.weight_fake_quant = FrozenFakeQuantize(found[0].baked)
    plot.name("moving-observer", {tap.site.name, f"{node}.weight"}, f"{node}.weight")


def _used_axis(plot: Plot, path: str) -> int:
    owner: Any = plot.prepared.get_submodule(path)
    return int(owner.weight_fake_quant.ch_axis)


def scale_formula(plot: Plot, place: int) -> None:
    """A fused fake-quant's weight, converted as its observer has it."""
    path, node, tap = plot.base.weighted[place]
    fused = copy.deepcopy(plot.base.observed.get_submodule(f"{path}.weight_fake_quant"))
    mine: Any = plot.prepared.get_submodule(path)
    theirs: Any = plot.baked.get_submodule(path)
    mine.weight_fake_quant = fused
    theirs.weight_fake_quant = FrozenFakeQuantize(_baked(fused))
    plot.name("scale-formula", {tap.site.name, f"{node}.weight"}, f"{node}.weight")


def other_qparams(plot: Plot, place: int) -> None:
    """A grid that was edited in the converted model."""
    taps = plot.base.groups[place]
    q = _used(taps[0])
    plot.swap(taps, None, replace(q, scale=q.scales[0] * 0.8))
    plot.name("other-qparams", _names(taps))


def edited_weight_scale(plot: Plot, place: int) -> None:
    """The codes of a weight under other scales."""
    path, node, tap = plot.base.weighted[place]
    theirs: Any = plot.baked.get_submodule(path)
    q = theirs.weight_fake_quant.qparams
    with torch.no_grad():
        theirs.weight.mul_(1.25)
    scales = tuple(s * 1.25 for s in q.scales)
    other = replace(q, scale=scales if q.axis is not None else scales[0])
    theirs.weight_fake_quant = FrozenFakeQuantize(other)
    plot.name("other-qparams", {tap.site.name, f"{node}.weight"}, f"{node}.weight")


def shared_qparams(plot: Plot, place: int) -> None:
    """The converted op keeps its first input's grid, as int8 kernels of pools and cat do."""
    taps = _alone(plot.base)[place]
    name = plot.base.inputs(taps[0])[0].site.name
    found = dialects.read(plot.converted()).tap(name).site.used  # int8 pools hand another's on
    assert found is not None
    q = _used(taps[0])
    plot.swap(taps, None, found.with_range(q.quant_min, q.quant_max))
    plot.name("shared-qparams", _names(taps), *_names(taps), name)


def uncalibrated(plot: Plot, place: int) -> None:
    """A fused fake-quant that no batch ever reached."""
    taps = plot.base.groups[place]
    q = _used(taps[0])
    module: Any = FusedMovingAvgObsFakeQuantize(
        MovingAverageMinMaxObserver, quant_min=q.quant_min, quant_max=q.quant_max, dtype=q.dtype
    )
    module.disable_observer()
    plot.swap(taps, module, _baked(module))
    plot.name("uncalibrated", _names(taps))


def uncalibrated_observer(plot: Plot, place: int) -> None:
    """An observer that no batch ever reached."""
    taps = plot.base.groups[place]
    q = _used(taps[0])
    module = MinMaxObserver(quant_min=q.quant_min, quant_max=q.quant_max, dtype=q.dtype)
    plot.swap(taps, module, _baked(module))
    plot.name("uncalibrated", plot.base.consumers(taps), *_names(taps))


# ------------------------------------------------------------------------- other values


def other_weights(plot: Plot, place: int) -> None:
    """Convert another weight: one of its channels is zero."""
    path, node, tap = plot.base.weighted[place]
    theirs: Any = plot.baked.get_submodule(path)
    with torch.no_grad():
        theirs.weight[-1] = 0.0
    plot.name("other-weights", {tap.site.name, f"{node}.weight"}, f"{node}.weight")


def other_bias(plot: Plot, place: int) -> None:
    """Convert another bias, a few codes away."""
    path, node, tap = plot.base.weighted[place]
    theirs: Any = plot.baked.get_submodule(path)
    with torch.no_grad():
        own = theirs.bias if theirs.bias is not None else torch.zeros(theirs.weight.shape[0])
        theirs.bias = nn.Parameter(own + 3.0 * _used(tap).scales[0])
    plot.name("other-weights", {tap.site.name, f"{node}.weight"}, f"{node}.weight")


# ----------------------------------------------------------------------------- in float


def fake_quant_off(plot: Plot, place: int) -> None:
    """Switch the fake-quant of an activation off."""
    taps = plot.base.groups[place]
    module = FrozenFakeQuantize(_used(taps[0]))
    module.disable_fake_quant()
    plot.swap(taps, module, None)
    plot.name("fake-quant-off", plot.base.consumers(taps), *_names(taps))


def weight_fake_quant_off(plot: Plot, place: int) -> None:
    """Switch the fake-quant of a weight off."""
    path, node, tap = plot.base.weighted[place]
    module: Any = plot.prepared.get_submodule(path)
    module.weight_fake_quant.disable_fake_quant()
    plot.name("fake-quant-off", {tap.site.name}, f"{node}.weight")


def observer_only(plot: Plot, place: int) -> None:
    """Leave a site with an observer, which quantizes nothing."""
    taps = plot.base.groups[place]
    q = _used(taps[0])
    module = FixedQParamsObserver(
        scale=q.scale,
        zero_point=q.zero_point,
        dtype=q.dtype,
        quant_min=q.quant_min,
        quant_max=q.quant_max,
    )
    plot.swap(taps, module, None)
    plot.name("observer-only", plot.base.consumers(taps), *_names(taps))


def not_lowered(plot: Plot, place: int) -> None:
    """Take a quantize out of the decomposed graph."""
    tap = plot.base.groups[place][0]

    def edit(model: fx.GraphModule) -> None:
        nodes = {n.name: n for n in model.graph.nodes}
        first, last = (nodes[f"{tap.site.name}_{end}"] for end in ("quantize", "dequantize"))
        last.replace_all_uses_with(first.args[0])
        model.graph.erase_node(last)
        model.graph.erase_node(first)

    plot.edits.append(edit)
    plot.gone.add(tap.site.name)
    plot.name("not-lowered", plot.base.consumers([tap]), tap.site.name)


def weight_not_lowered(plot: Plot, place: int) -> None:
    """Put the float weight back into the decomposed graph."""
    path, node, tap = plot.base.weighted[place]
    owner: Any = plot.prepared.get_submodule(path)
    weight = owner.weight.detach().clone()

    def edit(model: fx.GraphModule) -> None:
        old = next(n for n in model.graph.nodes if n.name == f"{node}_weight_dequantize")
        model.register_buffer(f"{node}_in_float", weight)
        with model.graph.inserting_before(old):
            new = model.graph.get_attr(f"{node}_in_float")
        old.replace_all_uses_with(new)
        model.graph.eliminate_dead_code()

    plot.edits.append(edit)
    plot.name("not-lowered", {tap.site.name}, f"{node}.weight")


# ------------------------------------------------------------- ranges, ties, train mode


def range_lost(plot: Plot, place: int) -> None:
    """A range that ends below the largest value, and a conversion that does not know it."""
    taps = plot.base.above_zero[place]
    q = _used(taps[0])
    low, _ = _range(q)
    scale = (0.6 * plot.base.peaks[taps[0].site.name] - low) / 127
    narrow = QParams(scale, round(-low / scale), 0, 127, torch.quint8)
    plot.swap(taps, FrozenFakeQuantize(narrow), narrow)

    def edit(model: fx.GraphModule) -> None:
        ends = {f"{t.site.name}_{end}" for t in taps for end in ("quantize", "dequantize")}
        for node in model.graph.nodes:
            if node.name in ends:
                node.args = (*node.args[:4], 255, *node.args[5:])

    if plot.engine is None:
        plot.edits.append(edit)
    plot.name("range-lost", _names(taps))


def rounding(plot: Plot, place: int) -> None:
    """Inputs on exact ties, an odd zero point, and the native quantize op's other rounding."""
    tap = plot.base.groups[place][0]
    q = _used(tap)
    odd = QParams(0.25, 65, q.quant_min, q.quant_max, q.dtype)
    plot.swap([tap], FrozenFakeQuantize(odd), odd)
    ties = (torch.arange(plot.batch.numel()) % 16 - 8 + 0.5) * 0.25
    plot.batch = ties.reshape(plot.batch.shape)

    def edit(model: fx.GraphModule) -> None:
        node = next(n for n in model.graph.nodes if n.name == f"{tap.site.name}_quantize")
        source, scale, point = node.args[:3]
        with model.graph.inserting_before(node):
            native = model.graph.call_function(
                torch.quantize_per_tensor, (source, scale, point, torch.quint8)
            )
            codes = model.graph.call_method("dequantize", (native,))
        node.replace_input_with(source, codes)

    if plot.engine is None:
        plot.edits.append(edit)
    plot.name("rounding", {tap.site.name})


def bias_int32(plot: Plot, place: int) -> None:
    """A grid so fine that a step of the accumulator is half a code of it."""
    path, _, tap = plot.base.weighted[place]
    weight: Any = plot.base.frozen.get_submodule(path)
    step = float(weight.weight_fake_quant.scale.max()) * _used(_fed(plot, tap)).scales[0]
    fine = QParams(2.0 * step, 128, 0, 255, torch.quint8)
    taps = next(taps for taps in plot.base.groups if tap in taps)
    plot.swap(taps, FrozenFakeQuantize(fine), fine)
    plot.name("bias-int32", {tap.site.name})


def _fed(plot: Plot, tap: Tap) -> Tap:
    return plot.base.inputs(tap)[0]


def _normed(plot: Plot) -> list[tuple[str, str, Tap]]:
    modules = dict(plot.base.unfolded.named_modules())
    return [found for found in plot.base.weighted if hasattr(modules[found[0]], "bn")]


def bn_folding(plot: Plot, place: int) -> None:
    """Leave a BatchNorm unfolded; wants a base that is shifted."""
    path, node, tap = _normed(plot)[place]
    _put(plot.prepared, path, copy.deepcopy(plot.base.unfolded.get_submodule(path)))
    plot.name("bn-folding", {tap.site.name}, f"{node}.weight")


def bn_training(plot: Plot, place: int) -> None:
    """Leave a BatchNorm unfolded and in train mode."""
    path, node, tap = _normed(plot)[place]
    _put(plot.prepared, path, copy.deepcopy(plot.base.unfolded.get_submodule(path)).train())
    plot.name("bn-training", {tap.site.name}, f"{node}.weight")


def dropout_training(plot: Plot, place: int) -> None:
    """Leave dropout in train mode."""
    tap = next(t for t in plot.base.reading.activations if t.site.op == "dropout")
    plot.prepared.get_submodule(str(tap.producer.target)).train()
    plot.name("dropout-training", {tap.site.name}, "dropout")


@dataclass(frozen=True)
class Plant:
    """A way to plant a cause.

    Attributes:
        cause: What it plants.
        put: Plants it at one of its places.
        places: How many places a base has for it.
        engines: What it can be planted in: int8 engines, None for the decomposed form.
        shifted: Whether it wants a base whose BatchNorms are shifted.
    """

    cause: str
    put: Callable[[Plot, int], None]
    places: Callable[[Base], int]
    engines: tuple[str | None, ...] = (None,)
    shifted: bool = False


_ALL = (None, *ENGINES)


def _sites(found: Base) -> int:
    return len(found.groups)


def _read(found: Base) -> int:
    """Sites whose values another site is computed from."""
    return sum(bool(found.consumers(taps)) for taps in found.groups)


def _positive(found: Base) -> int:
    return len(found.above_zero)


def _weights(found: Base) -> int:
    return len(found.weighted)


def _norms(found: Base) -> int:
    return len(_normed(Plot(found)))


PLANTS = {
    "stale-qparams": Plant("stale-qparams", stale_qparams, _sites, _ALL),
    "stale-buffers": Plant("stale-qparams", stale_buffers, _sites),
    "moving-observer": Plant("moving-observer", moving_observer, _sites, _ALL),
    "moving-weight": Plant("moving-observer", moving_weight, _weights),
    "scale-formula": Plant("scale-formula", scale_formula, _weights, _ALL),
    "other-qparams": Plant("other-qparams", other_qparams, _sites, _ALL),
    "edited-weight-scale": Plant("other-qparams", edited_weight_scale, _weights),
    "other-weights": Plant("other-weights", other_weights, _weights, _ALL),
    "other-bias": Plant("other-weights", other_bias, _weights, _ALL),
    "shared-qparams": Plant(
        "shared-qparams", shared_qparams, lambda found: len(_alone(found)), _ALL
    ),
    "uncalibrated": Plant("uncalibrated", uncalibrated, _sites, _ALL),
    "uncalibrated-observer": Plant("uncalibrated", uncalibrated_observer, _read),
    "fake-quant-off": Plant("fake-quant-off", fake_quant_off, _read, _ALL),
    "weight-fake-quant-off": Plant("fake-quant-off", weight_fake_quant_off, _weights),
    "observer-only": Plant("observer-only", observer_only, _read, _ALL),
    "not-lowered": Plant("not-lowered", not_lowered, _read),
    "weight-not-lowered": Plant("not-lowered", weight_not_lowered, _weights),
    "range-lost": Plant("range-lost", range_lost, _positive, _ALL),
    "rounding": Plant("rounding", rounding, lambda _: 1, _ALL),
    "bn-folding": Plant("bn-folding", bn_folding, _norms, (None,), shifted=True),
    "bn-training": Plant("bn-training", bn_training, _norms),
    "bias-int32": Plant("bias-int32", bias_int32, _weights, ("qnnpack",)),
    "dropout-training": Plant("dropout-training", dropout_training, lambda _: 1),
}


def places(plant: Plant, found: Base, most: int) -> list[int]:
    """Up to so many places of a plant, spread over the model."""
    count = plant.places(found)
    return sorted({round(i * (count - 1) / max(most - 1, 1)) for i in range(most)}) if count else []
