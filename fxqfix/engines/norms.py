"""Normalizations by a group's own statistics: the same kernels on every engine.

Products are fused with the sums they stand in, but in scalar code. Of a group's N codes, with
``u = f(sum q / N)``:

* ``m = f(u - z)``, ``v = fma(-u, u, f(sum q*q / N))``, at least 0,
  ``r = f(s / sqrt(f(f(v * s) * s) + eps))``, the root in double
* layer_norm: ``y = fma(f(f(f(q - z) - m) * r), gamma, beta)``
* group_norm, instance_norm: ``y = fma(f(f(q - z) - m), f(r * gamma), beta)``; channels-last
  ``y = fma(q - z, g, fma(-g, m, beta))`` with ``g = f(r * gamma)``

Then body and tail (see `_lookup`) in vectors of 32; all is body in contiguous group_norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxqfix.engines._arithmetic import fma, single
from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._layout import laid_out, suggested
from fxqfix.engines._lookup import Rounding
from fxqfix.engines._sums import moments
from fxqfix.engines.batch_norm import parameter
from fxqfix.errors import UnsupportedError

__all__ = ["GroupNorm", "LayerNorm"]

_ALL = ("fbgemm", "onednn", "qnnpack")
_LANES = 32  # codes in a vector; these kernels have no wider ones


def _apart(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """A product and a sum, each rounded: scalar code fuses none."""
    return a * b + c


class _Norm(Exact):
    """What the other norms share: statistics of groups, and the parameters."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.source, self.grid, self.node = call.source, call.grid, call.node
        self.eps = float(call.option("eps"))
        self.fma = _apart if call.scalar else fma
        self.rounding = Rounding(call, call.grid)
        self.threads, self.point = call.threads, int(call.source.zero_points[0])
        self.register_buffer("weight", parameter(call, "weight"))
        self.register_buffer("bias", parameter(call, "bias"))

    def statistics(self, sums: Tensor, squares: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """``(m, r)`` from sums of codes and of their squares, of groups of `count`."""
        scale, mean = single(self.source.scales[0]), sums.float() / float(count)
        variance = self.fma(-mean, mean, squares.float() / float(count)).clamp(min=0)
        deviation = torch.sqrt((variance * scale * scale).double() + self.eps)
        return mean - self.point, (scale / deviation).float()

    def parameters_of(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Gamma and beta, of shape (count,)."""
        one = torch.ones(count, device=like.device) if self.weight is None else self.weight
        none = torch.zeros(count, device=like.device) if self.bias is None else self.bias
        return one.reshape(count), none.reshape(count)


class LayerNorm(_Norm):
    """Each run of the last axes on its own."""

    def __init__(self, call: Call, shape: list[int]) -> None:
        super().__init__(call)
        self.axes, self.count = len(shape), int(torch.Size(shape).numel())

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        rows = codes.reshape(-1, self.count)
        sums = rows.double().sum(1, keepdim=True), rows.double().square().sum(1, keepdim=True)
        m, r = self.statistics(*sums, self.count)
        x = (rows.int() - self.point).float()
        y = self.fma((x - m) * r, *self.parameters_of(self.count, codes))
        vector = torch.arange(self.count, device=codes.device) < self.count // _LANES * _LANES
        found = torch.where(vector, self.rounding.body(y), self.rounding.tail(y))
        return suggested(found.reshape(codes.shape), codes.contiguous())


@kernel("layer_norm", engines=_ALL)
def _layer_norm(call: Call) -> nn.Module:
    shape = list(call.option("normalized_shape"))
    if not all(isinstance(size, int) for size in shape):
        raise call.refuse("its shape is not a constant")
    return LayerNorm(call, shape)


class GroupNorm(_Norm):
    """Each group of channels of each image on its own; 0 groups: each channel."""

    def __init__(self, call: Call, groups: int) -> None:
        super().__init__(call)
        self.groups = groups

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out.

        Raises:
            UnsupportedError: The kernel leaves images out; see `_check`.
        """
        channels, pixels = codes.shape[1], codes[0, 0].numel()
        groups = self.groups or channels
        last = codes.dim() == 4 and codes.is_contiguous(memory_format=torch.channels_last)
        if last:
            self._check(codes, groups)
        size = channels // groups
        sums, squares = moments(codes, groups, last, self.threads)
        found = self.statistics(sums, squares, size * pixels)
        gamma, beta = self.parameters_of(channels, codes)
        m, r = (t.repeat_interleave(size, 1) for t in found)
        wide = (*codes.shape[:2], *(1 for _ in codes.shape[2:]))
        x, g = (codes.int() - self.point).float(), (r * gamma).reshape(wide)
        m, beta = m.reshape(wide), beta.reshape(1, *wide[1:])
        if not last:
            return laid_out(self.rounding.body(self.fma(x - m, g, beta)), 0)
        y = self.fma(x, g, self.fma(-g, m, beta))
        span = size if pixels < 512 else channels
        lane = torch.arange(channels, device=codes.device).reshape(1, *wide[1:]) % span
        vector = lane < span // _LANES * _LANES
        return suggested(torch.where(vector, self.rounding.body(y), self.rounding.tail(y)), codes)

    def _check(self, codes: Tensor, groups: int) -> None:
        """The channels-last kernel counts images up to the elements of a group only."""
        elements = codes[0].numel() // groups
        if codes[0, 0].numel() < 512 and len(codes) > elements:
            raise UnsupportedError(
                "the channels-last kernel leaves the last images out",
                where=f"node {self.node!r}",
                found=f"{len(codes)} images, groups of {elements} elements",
                remedy="make its input contiguous, or the batch smaller",
            )


@kernel("group_norm", "instance_norm", engines=_ALL)
def _group_norm(call: Call) -> nn.Module:
    return GroupNorm(call, 0 if call.key == "instance_norm" else int(call.option("num_groups")))
