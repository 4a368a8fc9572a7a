"""Models that the routes' tests deploy; made once per process, never changed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from fxqfix import to_decomposed
from tests.engines import nets

# Six architectures of different ops, with ranges that fbgemm's qconfig reduces to 7 bits.
NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": nets.PlainCNN,
    "residual": nets.Residual,
    "mobile": nets.Mobile,
    "inception": nets.Inception,
    "shuffle": nets.Shuffle,
    "unet": nets.UNet,
}
GAINS = (1.0, 1.5, 3.0)


def image(batch: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@functools.cache
def prepared(name: str) -> fx.GraphModule:
    """Trained for two steps' worth of observing, in eval mode.

    The input's range is three times what was seen, so that larger inputs exceed the later ranges.
    """
    torch.manual_seed(0)
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    net = NETS[name]().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of two steps, and not mostly of their start
    model = prepare_qat_fx(net, mapping, (image(),))
    with torch.no_grad():
        for seed in range(2):
            model(image(seed=seed))
        model.eval()
        model.activation_post_process_0.activation_post_process.max_val.fill_(3)
        model(image())
    return model


@functools.cache
def decomposed(name: str, pinned: bool = True) -> fx.GraphModule:
    return to_decomposed(prepared(name), pin_ranges=pinned)


def batches() -> list[Tensor]:
    return [gain * image(seed=seed) for seed, gain in enumerate(GAINS)]
