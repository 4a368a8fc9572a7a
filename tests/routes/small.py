"""Models of one or two layers, for what is asked of a single kernel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import (
    MinMaxObserver,
    QConfig,
    QConfigMapping,
    default_per_channel_weight_observer,
    default_weight_observer,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import prepare_fx


def whole_range(*, per_channel: bool = True) -> QConfigMapping:
    """Activations in [0,255]: pairs of products can leave 16 bits."""
    weight = default_per_channel_weight_observer if per_channel else default_weight_observer
    activation = MinMaxObserver.with_args(dtype=torch.quint8)
    return QConfigMapping().set_global(QConfig(activation=activation, weight=weight))


def rows(count: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(count, 16, generator=torch.Generator().manual_seed(seed))


@functools.cache
def linears(mapping: str = "fbgemm") -> fx.GraphModule:
    """Two linears, calibrated on `rows`; the input's range is three times what was seen."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    known = whole_range() if mapping == "whole" else get_default_qconfig_mapping(mapping)
    with torch.no_grad():
        net[0].weight.abs_()  # the more input, the more output
        prepared = prepare_fx(net, known, (rows(),))
        prepared(rows())
    first = prepared.activation_post_process_0
    if mapping == "whole":
        first.max_val.fill_(3)
    else:  # a histogram: see the large values a little
        first(torch.full((1000, 16), 3.0))
    return prepared


@functools.cache
def heavy(layer: str, *, per_channel: bool = True) -> fx.GraphModule:
    """A layer whose weights are all near their largest: every pair of products is large."""
    torch.manual_seed(0)
    nets = {"conv": nn.Conv2d(8, 8, 3, padding=1), "linear": nn.Linear(8, 8)}
    net = nn.Sequential(nets[layer], nn.ReLU()).eval()
    with torch.no_grad():
        net[0].weight.copy_(0.9 + 0.1 * torch.rand_like(net[0].weight))
        prepared = prepare_fx(net, whole_range(per_channel=per_channel), (bright(layer),))
        prepared(bright(layer))
    return prepared


def bright(layer: str) -> Tensor:
    shape = (2, 8, 6, 6) if layer == "conv" else (16, 8)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))
