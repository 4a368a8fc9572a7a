"""interpolate: nearest picks codes; bilinear is a kernel of its own, the same on every engine.

With the weights ``w0 = f(1 - w1)`` of two columns and ``h0``, ``h1`` of two rows,
``x = h0 * (w0 * a + w1 * b) + h1 * (w0 * c + w1 * d)`` of codes and ``rne(f(f(x - z) + z))``:

* contiguous: every product and sum rounds, also in the source index ``r * (i + 0.5) - 0.5``
* channels-last: the source index is fused; whole vectors of 8 channels fuse the second product
  with each sum, the channels behind them the first

Scalar code fuses nothing. An image of one pixel passes for channels-last; see `_layout.stored`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxqfix.engines._arithmetic import to_codes
from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._blend import line, weighted
from fxqfix.engines._layout import passes_for_last, stored, suggested
from fxqfix.qparams import round_native

__all__ = ["Bilinear", "Nearest"]

_ALL = ("fbgemm", "onednn", "qnnpack")
_LANES = 8


@dataclass(frozen=True)
class _Given:
    """Stands for a value that the graph computes: an input of the module."""

    index: int


class _Resize(Exact):
    """What both share: options of F.interpolate, some of them inputs."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def options_of(self, given: tuple[Any, ...]) -> dict[str, Any]:
        """Options as numbers."""

        def value(option: Any) -> Any:
            if isinstance(option, list | tuple):
                return [value(part) for part in option]
            return given[option.index] if isinstance(option, _Given) else option

        return {name: value(option) for name, option in self.options.items()}


class Nearest(_Resize):
    """The nearest code."""

    def forward(self, *given: Any) -> Tensor:
        """Codes and sizes in, codes out."""
        codes: Tensor = given[0]
        found = F.interpolate(codes.float(), **self.options_of(given))
        place = stored if passes_for_last(codes) else suggested
        return place(found.to(codes.dtype), codes)


class Bilinear(_Resize):
    """Four codes, weighted."""

    def __init__(self, call: Call, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.source, self.point = call.source, int(call.source.zero_points[0])
        self.point_first, self.scalar = call.point_first, call.scalar

    def forward(self, *given: Any) -> Tensor:
        """Codes and sizes in, codes out."""
        codes: Tensor = given[0]
        options = self.options_of(given)
        size = F.interpolate(codes[:1, :1].float(), **options).shape[2:]
        scales = _scales(options)
        last = passes_for_last(codes)
        fused = last and not self.scalar
        lines = [
            line(codes.shape[2 + i], size[i], bool(options["align_corners"]), scales[i], fused)
            for i in (0, 1)
        ]
        x = codes.to(torch.float32, memory_format=torch.contiguous_format)
        lines = [tuple(t.to(x.device) for t in found) for found in lines]
        if not fused:
            found = weighted(x, lines, None)
        else:
            vectors = codes.shape[1] // _LANES * _LANES
            found = torch.cat(
                [weighted(x[:, :vectors], lines, 1), weighted(x[:, vectors:], lines, 0)], 1
            )
        rounded = round_native(found - self.point, self.point, self.point_first)
        return (stored if last else suggested)(to_codes(rounded, self.source), codes)


def _scales(options: dict[str, Any]) -> tuple[float | None, float | None]:
    """The scale factors that the kernel computes with; None: the ratio of sizes."""
    factor = options["scale_factor"]
    if factor is None or options["recompute_scale_factor"]:
        return None, None
    both = factor if isinstance(factor, list | tuple) else (factor, factor)
    return float(both[0]), float(both[1])


_NAMES = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
_FIXED: dict[str, dict[str, Any]] = {  # what has no mode of its own
    "upsample_nearest": {"mode": "nearest"},
    "upsample_bilinear": {"mode": "bilinear", "align_corners": True},
}


@kernel("interpolate", engines=_ALL)
def _interpolate(call: Call) -> nn.Module:
    def known(node: fx.Node) -> Any:
        return _Given(call.inputs.index(node))

    options = {name: fx.map_arg(call.option(name), known) for name in _NAMES}
    options = options | _FIXED.get(getattr(call.target, "__name__", ""), {})
    options["mode"] = options["mode"] or "nearest"
    if call.option("antialias"):
        raise call.refuse("its kernel takes no antialias")
    if options["mode"] in ("nearest", "nearest-exact"):
        return Nearest(options)
    if options["mode"] != "bilinear":
        raise call.refuse(f"no exact arithmetic for mode {options['mode']!r}")
    return Bilinear(call, options)
