"""lint names what draws random numbers, and only that: held to running twice on two seeds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    QConfig,
    QConfigMapping,
    default_weight_fake_quant,
    disable_observer,
)
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import fxqfix
from fxqfix._torch import quiet

X = torch.linspace(-2, 2, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)


def depth(x: Tensor, p: float, training: bool = True) -> Tensor:
    if not training or p == 0.0:
        return x
    noise = torch.empty([x.shape[0], 1, 1, 1]).bernoulli_(1 - p)
    return x * noise


def shuffled(x: Tensor, how: str) -> Tensor:
    return x.roll(1, 1) if how == "roll" else x[:, torch.randperm(x.shape[1])]


fx.wrap("depth")
fx.wrap("shuffled")


class Leaf(nn.Module):
    """Not traceable: what FX is told to leave whole."""

    def __init__(self, how: str, p: float = 0.5) -> None:
        super().__init__()
        self.how, self.p, self.drop = how, p, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "function":
            return F.dropout(x, self.p, self.training)
        if self.how == "always":
            return F.dropout(x, self.p)
        if self.how == "module":
            return self.drop(x)
        if self.how == "numpy":
            return x * float(np.random.rand())
        if self.how == "python":
            return x * random.random()
        if self.how == "helper":
            return self._noisy(x, 0.1 if self.training else 0.0)
        if self.how == "attention":
            return F.scaled_dot_product_attention(
                x, x, x, dropout_p=self.p if self.training else 0.0
            )
        if self.how == "sorted":
            return x.flip(1) if bool(x.sum() > 0) else x.abs()
        return x + torch.normal(0.0, 1.0, (1,))

    def _noisy(self, x: Tensor, p: float) -> Tensor:
        return x + p * torch.rand_like(x) if p > 0 else x


class Around(nn.Module):
    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.op = nn.Conv2d(3, 4, 3), op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.conv(x))


class Narrowed(FakeQuantize):
    """Draws nothing."""

    def calculate_qparams(self) -> Any:
        scale, zero_point = self.activation_post_process.calculate_qparams()
        return scale * 0.8, zero_point


class Noisy(FakeQuantize):
    """Adds noise to what it quantizes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01 * torch.randn_like(x)


class Annealed(FakeQuantize):
    """Noise while training, none behind it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            return torch.where(torch.rand_like(x) < 0.5, x, y)
        return y


def prepared(op: Any, fake_quant: Any = FakeQuantize) -> Any:
    activation = fake_quant.with_args(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255
    )
    qconfig = QConfig(activation=activation, weight=default_weight_fake_quant)
    config = PrepareCustomConfig().set_non_traceable_module_classes([Leaf])
    mapping = QConfigMapping().set_global(qconfig)
    torch.manual_seed(0)
    with quiet():
        model = prepare_qat_fx(Around(op).train(), mapping, (X,), prepare_custom_config=config)
        model(X)
    return model.eval().apply(disable_observer)


def differs(model: Any) -> bool:
    found = []
    for seed in (1, 2):
        for use in (torch.manual_seed, np.random.seed, random.seed):
            use(seed)
        with torch.no_grad():
            found.append(model(X.clone()))
    return not torch.equal(*found)


OPS: dict[str, Any] = {
    "relu": F.relu,
    "depth": lambda x: depth(x, 0.5),
    "depth off": lambda x: depth(x, 0.5, False),
    "depth of nothing": lambda x: depth(x, 0.0),
    "shuffle": lambda x: shuffled(x, "any"),
    "roll": lambda x: shuffled(x, "roll"),
    "randn": lambda x: x + torch.randn_like(x),
    "method": lambda x: x * torch.ones_like(x).bernoulli_(0.5),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "rrelu off": lambda x: F.rrelu(x),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "attention off": lambda x: F.scaled_dot_product_attention(x, x, x),
    "gumbel": lambda x: F.gumbel_softmax(x, dim=1),
    **{f"leaf {how}": Leaf(how) for how in ("function", "always", "module", "numpy", "python")},
    **{f"leaf {how}": Leaf(how) for how in ("helper", "attention", "sorted", "normal")},
    "leaf of p=0": Leaf("always", 0.0),
    "attention module": nn.RReLU(),
}


@pytest.mark.parametrize("name", OPS)
def test_what_draws_is_named_and_nothing_else(name: str) -> None:
    model = prepared(OPS[name])
    state = torch.get_rng_state()
    found = [f.site for f in fxqfix.lint(model).findings if f.code == "nondeterministic"]
    assert torch.equal(torch.get_rng_state(), state)
    assert bool(found) == differs(model), found


@pytest.mark.parametrize("kind", [Narrowed, Noisy, Annealed])
def test_a_user_s_fake_quantize(kind: Any) -> None:
    model = prepared(F.relu, kind)
    found = [f.site for f in fxqfix.lint(model).findings if f.code == "nondeterministic"]
    assert bool(found) == (kind is Noisy) == differs(model)


def test_dropout_in_train_mode_is_named_by_its_own_check() -> None:
    model = prepared(Leaf("module"))
    model.get_submodule("op").drop.train()
    codes = {f.code for f in fxqfix.lint(model).findings if f.site.startswith("op")}
    assert "dropout-training" in codes
