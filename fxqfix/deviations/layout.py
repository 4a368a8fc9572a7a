"""Numbers that lie in another order: of weights, activations and results."""

from __future__ import annotations

from collections.abc import Iterator

from fxqfix.deviations._base import Change, Deviation
from fxqfix.deviations._layouts import WEIGHTS
from fxqfix.deviations._subject import Subject

__all__ = ["DEVIATIONS"]

_LINEAR = ("io-as-oi", "oi-as-io")
_FLIPS = ("flipped", "flipped-rows", "flipped-columns")
_ORDERS = tuple(n for n in WEIGHTS if "-as-" in n and n not in _LINEAR)


def _weights(*names: str) -> tuple[Change, ...]:
    return tuple({"w": name} for name in names)


def _flattened(subject: Subject) -> Iterator[Change]:
    if subject.reference.key in ("flatten", "reshape"):
        yield from ({"x": "nhwc-as-nchw"}, {"x": "nchw-as-nhwc"})
    elif subject.reference.key == "linear":
        yield from ({"x": "chw-as-hwc"}, {"x": "hwc-as-chw"})


def _images(subject: Subject) -> Iterator[Change]:
    if subject.reference.key not in ("flatten", "reshape"):
        yield from ({"x": "nchw-as-nhwc"}, {"x": "nhwc-as-nchw"})


PLACE = 60
DEVIATIONS = (
    Deviation(
        "weight-layout",
        "reads the weight in another layout than OIHW",
        "take the weight as OIHW, or export it in the layout that the device reads",
        _weights(*_ORDERS),
    ),
    Deviation(
        "kernel-flipped",
        "flips the kernel: it convolves where torch correlates",
        "do not flip the kernel",
        _weights(*_FLIPS),
        "kernels that are not symmetric",
    ),
    Deviation(
        "kernel-transposed",
        "swaps the kernel's rows and columns",
        "take the last axis of the weight as the width",
        _weights("kernel-transposed"),
        "kernels that are not symmetric",
    ),
    Deviation(
        "linear-transposed",
        "reads the weight of a linear op as inputs x outputs",
        "take it as outputs x inputs, OI",
        _weights(*_LINEAR),
    ),
    Deviation(
        "output-channels-permuted",
        "takes the weight's output channels in another order",
        "take them in order",
        _weights("rolled", "reversed"),
    ),
    Deviation(
        "input-layout",
        "takes the input in another layout: NCHW and NHWC are exchanged",
        "hand over and read activations in one layout",
        _images,
    ),
    Deviation(
        "output-layout",
        "gives the result in another layout: NCHW and NHWC are exchanged",
        "give NCHW, or name the layout in the manifest",
        ({"y": "nchw-as-nhwc"}, {"y": "nhwc-as-nchw"}),
    ),
    Deviation(
        "flatten-order",
        "flattens by pixels in place of by channels, or the other way round",
        "flatten NCHW: channels are outermost",
        _flattened,
    ),
)
