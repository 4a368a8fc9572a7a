"""Reports made by hand, so that the renderers are tested without a comparison."""

from __future__ import annotations

import math

import torch

from fxqfix.dialects.site import Inspection, Site
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.qparams import QParams
from fxqfix.report import Coverage, Report, Row, Uncovered

NARROW = QParams(1 / 128, 3, 0, 127, torch.quint8)
WIDE = NARROW.with_range(0, 255)
KERNEL = QParams(1 / 255, -128, -128, 127, torch.qint8)
OBSERVER = QParams(2 / 255, 0, -128, 127, torch.qint8)
CHANNELS = QParams((1 / 300, 1 / 100, 1 / 512), (0, 0, 0), -128, 127, torch.qint8, axis=0)


def apart(elements: int, differing: int, max_lsb: int = 1, out_of_range: int = 0) -> Discrepancy:
    """A discrepancy whose energies are plausible: scale 1/128, mean square 1/4."""
    noise = differing * (max_lsb / 128) ** 2
    signal = elements / 4
    return Discrepancy(
        elements=elements,
        differing=differing,
        max_lsb=max_lsb if differing else 0,
        sum_lsb=differing * max_lsb,
        out_of_range=out_of_range,
        saturated_low=differing // 3,
        saturated_high=differing // 2,
        max_abs=max_lsb / 128 if differing else 0.0,
        signal=signal,
        noise=noise,
        energy=signal + noise,
        product=signal,
    )


def sample() -> Report:
    """A small network with each kind of row: weight, input, exact, inherited, float neighbour."""
    rows = (
        Row(
            "x", "activation", "", "input", "quantize_per_tensor", NARROW, WIDE,
            local=apart(3072, 12, 9, 12), cumulative=apart(3072, 12, 9, 12),
            noise_floor=apart(3072, 1), causes={"range-lost": 12},
            evidence={"range-lost": "12 codes above 127, the prepared model clamps at 127"},
        ),
        Row(
            "conv1.weight", "weight", "conv1", "conv2d_relu", "", KERNEL, OBSERVER,
            local=None, cumulative=apart(27, 13, 1), causes={"stale-qparams": 13},
            evidence={"stale-qparams": "kernel ran 0.00392157/-128, conversion bakes 0.00784314/0"},
        ),
        Row(
            "conv1", "activation", "conv1", "conv2d_relu", "quantized.conv2d_relu", NARROW, WIDE,
            local=apart(16384, 57, 2, 3), cumulative=apart(16384, 95, 3, 5),
            noise_floor=apart(16384, 2), causes={"rounding": 1, "range-lost": 56, "upstream": 38},
            evidence={"rounding": "1 code sits on a tie"},
            inputs=("x", "conv1.weight"), engine="onednn", accumulator=874_800, saturation=12,
        ),
        Row(
            "fc.weight", "weight", "fc", "linear", "", CHANNELS, CHANNELS,
            local=None, cumulative=apart(640, 0),
        ),
        Row(
            "fc", "activation", "fc", "linear", "quantized.linear", WIDE, WIDE,
            local=apart(10, 0), cumulative=apart(10, 2), noise_floor=apart(10, 0),
            causes={"upstream": 2}, inputs=("conv1", "fc.weight", "gone"), note="the output",
            engine="fbgemm", accumulator=10_444_800, saturation=0,
        ),
    )  # fmt: skip
    coverage = Coverage(
        paired=(*((row.name, row.name, "name") for row in rows[:4]), ("fc", "fc_1", "dataflow")),
        unpaired=(Uncovered("add_1", "prepared", "no converted site has its inputs"),),
        unsupported=(Uncovered("lstm", "converted", "dynamic: its qparams depend on the batch"),),
    )
    return Report(rows, coverage, "fbgemm", 3, ("observers were held still",))


def exact_sample() -> Report:
    """Two sites and an output that are equal to the bit."""
    same = apart(64, 0)
    rows = (
        Row("x", "activation", "", "input", "quantize_per_tensor", WIDE, WIDE, same, same, same),
        Row("relu", "activation", "r", "relu", "quantized.relu", WIDE, WIDE, same, same, same),
        output(same, "relu"),
    )
    return Report(rows, Coverage(tuple((r.name, r.name, "name") for r in rows[:2])), "x86", 1)


def output(found: Discrepancy, *inputs: str) -> Row:
    """The row of an output."""
    return Row(
        "output 0", "output", "", "output", "", None, None, found, found, found, inputs=inputs
    )


def hostile() -> Report:
    """Names and sentences that try to leave their place, and figures that aren't finite."""
    nasty = '</td><script>alert("1")</script> & "q" \\ | \n x'
    broken = Discrepancy(elements=4, differing=4, max_lsb=1, signal=math.inf, noise=math.inf)
    row = Row(
        nasty, "activation", nasty, nasty, nasty, NARROW, KERNEL, broken, broken,
        causes={nasty: 4}, evidence={nasty: nasty}, inputs=(nasty, "<b>"), note=nasty,
    )  # fmt: skip
    gone = Uncovered(nasty, "prepared", nasty)
    return Report((row,), Coverage(unpaired=(gone,), unsupported=(gone,)), nasty, 1, (nasty,))


def many(count: int) -> Report:
    """A chain of `count` sites with errors that grow."""
    names = [f"features_{i}_0" for i in range(count)]
    rows = tuple(
        Row(
            name, "activation", name, "conv2d", "quantized.conv2d", NARROW, WIDE,
            local=apart(4096, i), cumulative=apart(4096, 9 * i, 1 + i // 9),
            noise_floor=apart(4096, 1 + i // 4),
            causes={"range-lost": i, "rounding": i // 4, "upstream": 8 * i},
            inputs=tuple(names[i - 1 : i]),
        )
        for i, name in enumerate(names)
    )  # fmt: skip
    return Report(rows, engine="fbgemm", batches=1)


def inspection() -> Inspection:
    """Sites of each kind, one of them with other qparams baked."""
    sites = (
        Site("x", "activation", "", "input", NARROW, WIDE, "activation_post_process_0"),
        Site("conv1.weight", "weight", "conv1", "conv2d", KERNEL, OBSERVER, "fused kernel",
             shape=(3, 3, 1, 1)),
        Site("conv1", "activation", "conv1", "conv2d", NARROW, NARROW, "observer", quantizes=False),
        Site("fc.weight", "weight", "fc", "linear", shape=(10, 8)),
        Site("fc", "activation", "fc", "linear", WIDE, calibrated=False, source="observer"),
    )  # fmt: skip
    return Inspection("fx-prepared", sites, (("lstm", "no row of the op table"),))
