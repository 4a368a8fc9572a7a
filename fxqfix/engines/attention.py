"""The quantized multi-head attention of the eager flow.

Projections run on codes; between them the module dequantizes, and attention itself is float. Its
queries are scaled by moving their grid, and with batch_first the heads' results are taken for those
of the positions, as in torch's module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxqfix.dialects.quantizer import qparams_of
from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._inner import inner
from fxqfix.engines.boundary import Quantize
from fxqfix.engines.elementwise import Cat
from fxqfix.qparams import QParams, container_range, dequantize

__all__ = ["Attention"]

_ALL = ("fbgemm", "onednn", "qnnpack")
_MASKS = ("key_padding_mask", "attn_mask")


class _Queries(Exact):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.linear, self.scale = module.linear_Q, module.q_scaling_product
        self.factor = float(module.embed_dim // module.num_heads) ** -0.5

    def forward(self, x: Tensor) -> Any:
        return self.scale.mul_scalar(self.linear(x), self.factor)


class _Mean(Exact):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def _at(name: str) -> Callable[[str], str]:
    return lambda path: f"linear_{name}"


def _out(path: str) -> str:
    return "out_proj"


def _grid(module: Any) -> QParams:
    return qparams_of(module.scale, module.zero_point, *container_range(module.dtype), module.dtype)


class Attention(Exact):
    """torch.ao.nn.quantized.MultiheadAttention on codes.

    Args:
        call: The call of the module.
        masks: Names of the masks that it is called with, in order.
    """

    def __init__(self, call: Call, masks: list[str]) -> None:
        super().__init__()
        module: Any = call.module
        self.masks, self.heads = masks, module.num_heads
        self.batch_first, self.zeros = module.batch_first, module.add_zero_attn
        self.weights = bool(call.arguments.get("need_weights", True))
        own, score = _grid(module.quant_attn_output), _grid(module.quant_attn_output_weights)
        self.queries, (q,) = inner(_Queries(module), (call.grid_of(0),), call, _at("Q"))
        self.keys, (k,) = inner(nn.Sequential(module.linear_K), (call.grid_of(1),), call, _at("K"))
        self.values, (v,) = inner(
            nn.Sequential(module.linear_V), (call.grid_of(2),), call, _at("V")
        )
        self.project, _ = inner(nn.Sequential(module.out_proj), (own,), call, _out)
        self.average = None
        if call.arguments.get("average_attn_weights", True):
            self.average, _ = inner(_Mean(), (score,), call)
        self.grids = q, k, v
        self.own, self.score = (Quantize(grid, call.point_first) for grid in (own, score))
        self.more: list[Tensor] = []
        self.joins = nn.ModuleList()
        for bias, grid in ((module.bias_k, k), (module.bias_v, v)) if _has_bias(module) else ():
            other = qparams_of(bias.q_scale(), bias.q_zero_point(), *grid.container, bias.dtype)
            joining = replace(call, key="cat", qparams=(grid, other), output=grid)
            self.more.append(bias.int_repr())
            self.joins.append(Cat(joining, (grid, other), 0))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes in, codes out."""
        query, key, value = (x.transpose(0, 1) if self.batch_first else x for x in inputs[:3])
        length, batch, size = query.shape
        found = [self.queries(query), self.keys(key), self.values(value)]
        for index, (join, bias) in enumerate(zip(self.joins, self.more, strict=True), 1):
            found[index] = join(found[index], bias.to(key.device).repeat(1, batch, 1))
        masks = dict(zip(self.masks, inputs[3:], strict=True))
        heads = [c.reshape(-1, batch * self.heads, size // self.heads) for c in found]
        heads = [c.transpose(0, 1) for c in heads]
        for index in (1, 2) if self.zeros else ():
            pads = (0, 0, 0, 1)
            heads[index] = F.pad(heads[index], pads, value=int(self.grids[index].zero_points[0]))
        masks = {k: F.pad(m, (0, len(self.joins) // 2 + self.zeros)) for k, m in masks.items()}
        q, k, v = (dequantize(c, grid) for c, grid in zip(heads, self.grids, strict=True))
        score = self._masked(torch.bmm(q, k.transpose(1, 2)), batch, masks).softmax(-1)
        result = torch.bmm(score, v)
        shape = (batch, length, size) if self.batch_first else (length, batch, size)
        result = result if self.batch_first else result.transpose(0, 1)
        output = self.project(self.own(result.reshape(shape)))
        if not self.weights:
            return output, None
        codes = self.score(score).unflatten(0, (batch, self.heads))
        return output, codes if self.average is None else self.average(codes)

    def _masked(self, score: Tensor, batch: int, masks: dict[str, Tensor]) -> Tensor:
        mask = masks.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            score = score + mask
        elif mask is not None:
            score = score.masked_fill(mask.bool(), -math.inf)
        mask = masks.get("key_padding_mask")
        if mask is None:
            return score
        apart = score.reshape(batch, self.heads, *score.shape[1:])
        apart = apart.masked_fill(mask.bool()[:, None, None], -math.inf)
        return apart.reshape(score.shape)


def _has_bias(module: Any) -> bool:
    return module.bias_k is not None and module.bias_v is not None


@kernel("multihead_attention", engines=_ALL, native=True)
def _attention(call: Call) -> nn.Module:
    given = [name for name in call.arguments if call.arguments[name] is not None]
    masks = [name for name in given if name in _MASKS]
    nodes = [call.arguments[name] for name in ("query", "key", "value", *masks)]
    if not all(isinstance(n, fx.Node) for n in nodes) or tuple(nodes) != call.inputs:
        raise call.refuse("its masks are not arguments of the model")
    return Attention(call, masks)
