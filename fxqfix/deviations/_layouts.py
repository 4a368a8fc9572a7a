"""Other ways in which the same numbers can lie: of weights, of activations, of results.

Each is a function of a tensor that keeps its shape, or None where the sizes don't allow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

__all__ = ["IMAGES", "WEIGHTS", "arranged", "columns", "weight_as"]


def _as(order: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Written in torch's order, read as if its axes were in another one."""

    def read(t: Tensor) -> Tensor:
        shape = [t.shape[axis] for axis in order]
        back = sorted(range(len(order)), key=lambda i: order[i])
        return t.contiguous().reshape(shape).permute(back).contiguous()

    return read


def _from(order: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Written in another order, read as torch's."""
    return lambda t: t.permute(order).contiguous().reshape(t.shape)


def _last(dims: int) -> tuple[int, ...]:
    return (0, *range(2, dims), 1)


IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw-as-nhwc": lambda t: _as(_last(t.dim()))(t),
    "nhwc-as-nchw": lambda t: _from(_last(t.dim()))(t),
}

_ORDERS = {"ohwi": (0, 2, 3, 1), "ihwo": (1, 2, 3, 0), "hwio": (2, 3, 1, 0), "iohw": (1, 0, 2, 3)}

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"oihw-as-{name}": _as(order) for name, order in _ORDERS.items()},
    **{f"{name}-as-oihw": _from(order) for name, order in _ORDERS.items()},
    "flipped": lambda t: t.flip(tuple(range(2, t.dim()))),
    "flipped-rows": lambda t: t.flip(2),
    "flipped-columns": lambda t: t.flip(t.dim() - 1),
    "kernel-transposed": lambda t: t.transpose(-1, -2).contiguous().reshape(t.shape),
    "io-as-oi": lambda t: _from((1, 0))(t),
    "oi-as-io": lambda t: _as((1, 0))(t),
    "rolled": lambda t: t.roll(1, 0),
    "reversed": lambda t: t.flip(0),
}


def weight_as(weight: Tensor, name: str) -> Tensor | None:
    """A weight in another layout; None where it has none, or where it is the same."""
    is_linear, of_linear = weight.dim() == 2, name in ("io-as-oi", "oi-as-io", "rolled", "reversed")
    if is_linear != of_linear and name not in ("rolled", "reversed"):
        return None
    if "hw" in name and weight.dim() != 4:
        return None
    found = WEIGHTS[name](weight)
    return None if found.equal(weight) else found


def arranged(x: Tensor, name: str) -> Tensor | None:
    """An image in another layout; None where it is none."""
    return IMAGES[name](x) if name in IMAGES and x.dim() >= 3 else None


def columns(features: int, image: tuple[int, ...], name: str) -> list[int] | None:
    """Where each feature of a flattened image comes from, if it is flattened in another order.

    Args:
        features: How many there are.
        image: (channels, height, width).
        name: "chw-as-hwc" (given by channels, taken by pixels) or "hwc-as-chw".
    """
    if not image or math.prod(image) != features:
        return None
    channels, pixels = image[0], features // image[0]
    if name == "hwc-as-chw":
        return [(f % pixels) * channels + f // pixels for f in range(features)]
    return [(f % channels) * pixels + f // channels for f in range(features)]
