"""embedding and embedding_bag of 8-bit and 4-bit rows, in floats: the same kernel on every engine.

A row has a scale s and a bias ``b = -f(z * s)``, both rounded to float16 with 4 bits. Rows of a bag
are added one by one, ``y = fma(f(s * w), q, f(y + f(b * w)))``, w the sample's weight or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxqfix.engines._arithmetic import fma
from fxqfix.engines._base import Call, Exact, kernel

__all__ = ["Embedding", "EmbeddingBag"]

_ALL = ("fbgemm", "onednn", "qnnpack")


class EmbeddingBag(Exact):
    """Sums of rows; the kernel knows no other mode."""

    codes: Tensor
    scales: Tensor
    biases: Tensor

    def __init__(self, call: Call) -> None:
        super().__init__()
        if call.weight is None:
            raise call.refuse("it has no integer weight")
        if call.option("pruned_weights") or call.option("compressed_indices_mapping") is not None:
            raise call.refuse("its rows are pruned")
        grid = call.weight.qparams
        scales = torch.tensor(grid.scales, dtype=torch.float32)
        biases = -(torch.tensor(grid.zero_points, dtype=torch.float32) * scales)
        if grid.bits < 8:
            scales, biases = scales.half().float(), biases.half().float()
        self.last = bool(call.option("include_last_offset"))
        self.register_buffer("codes", call.weight.codes)
        self.register_buffer("scales", scales)
        self.register_buffer("biases", biases)

    def forward(self, indices: Tensor, *more: Tensor | None) -> Tensor:
        """Indices, and where they are given offsets (whole numbers) and weights (floats)."""
        given = [t for t in more if t is not None]
        offsets = next((t for t in given if not t.is_floating_point()), None)
        weights = next((t for t in given if t.is_floating_point()), None)
        flat = indices.reshape(-1).long()
        if offsets is None:
            offsets = torch.arange(0, len(flat), indices.shape[-1], device=flat.device)
        starts, end = offsets.long(), offsets.new_full((1,), len(flat)).long()
        ends = starts[1:] if self.last else torch.cat([starts[1:], end])
        return self.sums(flat, starts[: len(ends)], ends, weights)

    def sums(self, flat: Tensor, starts: Tensor, ends: Tensor, weights: Tensor | None) -> Tensor:
        """The sum of the rows of each bag."""
        total = torch.zeros(len(starts), self.codes.shape[1], device=flat.device)
        for step in range(int((ends - starts).max()) if len(starts) else 0):
            inside = starts + step < ends
            place = (starts + step)[inside]
            row = flat[place]
            w = 1.0 if weights is None else weights.reshape(-1)[place]
            scale, bias = (self.scales[row] * w).unsqueeze(1), (self.biases[row] * w).unsqueeze(1)
            total[inside] = fma(scale, self.codes[row].float(), total[inside] + bias)
        return total


class Embedding(EmbeddingBag):
    """Single rows."""

    def forward(self, indices: Tensor, *_: Tensor | None) -> Tensor:
        """Indices."""
        flat = indices.reshape(-1).long()
        starts = torch.arange(len(flat), device=flat.device)
        return self.sums(flat, starts, starts + 1, None).reshape(*indices.shape, -1)


@kernel("embedding_bag", engines=_ALL)
def _bag(call: Call) -> nn.Module:
    return EmbeddingBag(call)


@kernel("embedding", engines=_ALL)
def _embedding(call: Call) -> nn.Module:
    return Embedding(call)
