"""batch_norm: the same kernel on every engine.

``rne(fma(a, q - z, b)) + z'`` with ``i = f(1 / f(sqrt(f(var + f(eps)))))``,
``a = f(f(i * w) * (s / s'))`` and ``b = f(f(bias - f(f(mean * i) * w)) / s')``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxqfix.engines._arithmetic import fma, single, to_codes
from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._layout import laid_out

__all__ = ["BatchNorm", "parameter"]

_ALL = ("fbgemm", "onednn", "qnnpack")


class BatchNorm(Exact):
    """An affine map of each channel's codes; images come out channels-last."""

    scale: Tensor
    shift: Tensor

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.grid, self.relu, self.point = call.grid, call.relu, int(call.source.zero_points[0])
        module = call.module is not None
        mean = parameter(call, "running_mean" if module else "mean")
        variance = parameter(call, "running_var" if module else "var")
        weight, bias = parameter(call, "weight"), parameter(call, "bias")
        if mean is None or variance is None or weight is None or bias is None:
            raise call.refuse("its kernel needs statistics, a weight and a bias")
        target = call.grid.scales[0]
        # torch.sqrt of floats is not correctly rounded everywhere; that of doubles, rounded, is.
        root = (variance + single(call.option("eps"))).double().sqrt().float()
        inverse = (1.0 / root.double()).float()
        slope = inverse * weight
        self.register_buffer("scale", (slope.double() * (call.source.scales[0] / target)).float())
        shift = bias - mean * inverse * weight
        self.register_buffer("shift", (shift.double() / target).float())

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        if not codes.numel():
            return codes.clone()
        shape = (-1, *(1 for _ in codes.shape[2:]))
        x = (codes.int() - self.point).float()
        y = torch.round(fma(x, self.scale.reshape(shape), self.shift.reshape(shape)))
        found = to_codes(y + int(self.grid.zero_points[0]), self.grid, relu=self.relu)
        if codes.dim() > 3:
            return laid_out(found, codes.dim() - 2)
        image = found.reshape(*found.shape, *(1 for _ in range(4 - found.dim())))
        image = laid_out(image, 2).contiguous()
        return image.squeeze(-1) if codes.dim() == 3 else image.squeeze(-1).squeeze(-1)


def parameter(call: Call, name: str) -> Tensor | None:
    """A parameter or statistic of an op, None where it has none.

    Raises:
        UnsupportedError: It is computed by the graph.
    """
    found = call.option(name)
    if found is not None and not isinstance(found, Tensor):
        raise call.refuse(f"its {name} is not a constant")
    return None if found is None else found.detach().float()


@kernel("batch_norm", *(f"batch_norm{d}d" for d in (1, 2, 3)), engines=_ALL)
def _batch_norm(call: Call) -> nn.Module:
    call.check_vectors()
    return BatchNorm(call)
