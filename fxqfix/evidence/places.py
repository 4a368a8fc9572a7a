"""Positions of codes in a tensor: what causes look at, in place of all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxqfix._regrid import regrid
from fxqfix.qparams import QParams, quantize

__all__ = ["SAMPLE", "Places"]

# As many elements are looked at beside those that differ, evenly spread: what float32 arithmetic
# is off by at a site is measured there too. Smaller tensors are looked at as a whole.
SAMPLE = 2**16


@dataclass(frozen=True)
class Places:
    """Some of the elements of tensors of one shape, in their order.

    Attributes:
        shape: Of the tensors.
        device: Where they are.
        at: Places in the flattened tensor, int64, ascending; None for all of them.

    Example:
        >>> places = Places.of(torch.tensor([[False, True], [True, False]]))
        >>> places.take(torch.tensor([[1, 2], [3, 4]])).tolist()
        [1, 2, 3, 4]
    """

    shape: torch.Size
    device: torch.device
    at: Tensor | None = None

    @classmethod
    def of(cls, wanted: Tensor) -> Places:
        """The places of a mask that are set, and an even sample of all.

        Args:
            wanted: The mask, contiguous. It is changed.
        """
        if wanted.numel() <= SAMPLE:
            return cls(wanted.shape, wanted.device)
        flat = wanted.flatten()
        flat[:: math.ceil(flat.numel() / SAMPLE)] = True
        return cls(wanted.shape, wanted.device, flat.nonzero().squeeze(1))

    def __len__(self) -> int:
        """How many there are."""
        return math.prod(self.shape) if self.at is None else self.at.numel()

    @property
    def everywhere(self) -> bool:
        """Whether these are all elements."""
        return self.at is None

    def take(self, value: Tensor) -> Tensor:
        """The values at these places, 1-d; of a tensor that broadcasts to the shape.

        Args:
            value: The tensor.
        """
        flat = value.expand(self.shape).reshape(-1)
        return flat if self.at is None else flat.index_select(0, self.at)

    def spread(self, values: Tensor, axis: int) -> Tensor:
        """Of one value per channel, that of the channel of each place.

        Args:
            values: 1-d, as long as the axis.
            axis: The axis of the channels.
        """
        if self.at is None:
            shape = [1] * len(self.shape)
            shape[axis] = -1
            return self.take(values.reshape(shape))
        axis %= len(self.shape)
        rows = self._rows(axis)
        if rows is None:
            return values.index_select(0, self.at % self.shape[axis])
        found = values.repeat(rows.numel() // values.numel())
        return found.repeat_interleave(rows, output_size=len(self))

    def _rows(self, axis: int) -> Tensor | None:
        """How many places lie in each run of one channel; None where runs are single elements."""
        inner = math.prod(self.shape[axis + 1 :])
        if inner == 1:
            return None
        if axis not in self._known:
            ends = torch.arange(0, math.prod(self.shape) + 1, inner, device=self.device)
            self._known[axis] = torch.searchsorted(self._at, ends).diff()
        return self._known[axis]

    @cached_property
    def _known(self) -> dict[int, Tensor]:
        return {}

    @property
    def _at(self) -> Tensor:
        assert self.at is not None  # asked for in a part of a tensor only
        return self.at

    def regrid(self, codes: Tensor, source: QParams, target: QParams) -> Tensor:
        """Codes at these places on another grid; see `fxqfix._regrid.regrid`.

        Args:
            codes: On `source`.
            source: Their grid.
            target: The grid to express them in.
        """
        if source.same_grid(target) or (source.axis is None and target.axis is None):
            return regrid(codes, source, target)
        scale, point = self.grid(source)
        values = codes.double().sub_(point).mul_(scale)
        scale, point = self.grid(target)
        return values.div_(scale).round_().add_(point).clamp_(-(2**30), 2**30).to(torch.int32)

    def quantize(self, values: Tensor, qparams: QParams) -> Tensor:
        """Codes of values at these places; see `fxqfix.qparams.quantize`.

        Args:
            values: Floats.
            qparams: The grid.
        """
        if qparams.axis is None:
            return quantize(values, qparams)
        scale, point = self.grid(qparams, torch.float32)
        codes = values.float() * (1.0 / scale)
        codes = codes.round_().add_(point) if qparams.whole else codes.add_(point).round_()
        return codes.clamp_(qparams.quant_min, qparams.quant_max).to(torch.int32)

    def grid(self, qparams: QParams, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Scale and zero point at these places: one of each where the grid is per tensor.

        Args:
            qparams: The grid.
            dtype: Of the result.
        """
        scale = torch.tensor(qparams.scales, dtype=torch.float32, device=self.device).to(dtype)
        point = torch.tensor(qparams.zero_points, dtype=dtype, device=self.device)
        if qparams.axis is None:
            return scale.reshape(()), point.reshape(())
        return self.spread(scale, qparams.axis), self.spread(point, qparams.axis)
