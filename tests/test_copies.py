"""Deep copies of models: everything that copy.deepcopy gives, and nothing shared with the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxqfix import to_decomposed
from fxqfix._copies import deep_copy
from fxqfix.dialects.trace import trace
from tests.op_flows import convert, prepare
from tests.op_samples import SAMPLES
from tests.states import bits

NAMES = ("conv2d_bn", "linear", "lstm", "lstm_eager", "embedding", "attention", "float_norms")
CASES = [(s, setting) for s in SAMPLES if s.name in NAMES for setting in s.settings]
FORMS: dict[str, Callable[..., nn.Module]] = {
    "prepared": prepare,
    "traced": lambda sample, setting: trace(prepare(sample, setting)),
    "int8": lambda sample, setting: convert(sample, setting, prepare(sample, setting)),
    "decomposed": lambda sample, setting: to_decomposed(prepare(sample, setting)),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:must run observer before calling:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:erase_node\(dequantize:UserWarning"),
]


def described(value: Any, places: dict[int, int]) -> Any:
    """A value down to its bits; where it, or its memory, was met before, the place of that."""
    if isinstance(value, (int, float, str, bytes, bool, type(None), type, torch.dtype)):
        return repr(value)
    first = places.setdefault(id(value), len(places))
    if first != len(places) - 1:
        return f"as {first}"
    if isinstance(value, Tensor):
        memory = places.setdefault(value.untyped_storage().data_ptr(), len(places))
        # Parameters of a copy own their memory, whatever they shared.
        return type(value), bits(value), None if isinstance(value, nn.Parameter) else memory
    if isinstance(value, fx.Graph):
        return [(n.format_node(), n.name, described(n.meta, places)) for n in value.nodes]
    if isinstance(value, dict):
        return type(value), [(k, described(v, places)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [described(v, places) for v in value]
    if isinstance(value, nn.Module):
        kind = "GraphModule" if isinstance(value, fx.GraphModule) else type(value)
        return kind, described(vars(value), places)
    return type(value)


def tensors(model: nn.Module) -> set[int]:
    return {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


@pytest.mark.parametrize("form", FORMS)
def test_models_of_every_kind(form: str) -> None:
    made = 0
    for sample, setting in CASES:
        if form == "int8" and any(limit.what == "convert" for limit in sample.limits):
            continue
        model = FORMS[form](sample, setting)
        keep: list[Any] = [deep_copy(model), copy.deepcopy(model)]  # alive: their ids are compared
        mine, theirs = (described(copied, {}) for copied in keep)
        assert mine == theirs, (sample.name, setting)
        assert not tensors(keep[0]) & tensors(model)
        made += 1
    assert made >= 10


class Odd(nn.Module):
    """What else a module may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.twice = nn.Linear(2, 2), nn.Linear(2, 2)
        self.again, self.twice.weight = self.twice, self.inner.weight
        self.register_buffer("whole", torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("part", self.whole[1:])
        self.register_buffer("codes", torch.quantize_per_tensor(self.whole, 0.5, 3, torch.quint8))
        self.plain, self.nested = self.whole[0], {"a": [self.whole, {3: self.part}], 3: (1, "b")}
        self.register_buffer("none", None)
        self.inner.register_forward_hook(_hook)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.inner(x))


def _hook(*_: Any) -> None:
    """Does nothing."""


class Owned(nn.Module):
    """Holds the graph module that it is a part of."""

    owner: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Itself(nn.Linear):
    """Has a copier of its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Itself:
        made = Itself(2, 2)
        made.said = "copied"  # type: ignore[assignment]  # no tensor
        return made


def test_shared_memory_hooks_and_plain_attributes() -> None:
    model = Odd()
    mine, theirs = deep_copy(model), copy.deepcopy(model)
    assert described(mine, {}) == described(theirs, {})
    assert mine.again is mine.twice
    assert mine.inner.weight is mine.twice.weight
    assert mine.inner._forward_hooks is not model.inner._forward_hooks
    mine.whole.zero_()
    assert not mine.part.any()
    assert not mine.nested["a"][1][3].any()
    assert model.whole.any()


def test_modules_with_a_copier_of_their_own() -> None:
    copied = deep_copy(nn.Sequential(nn.ReLU(), Itself(2, 2)))
    assert copied[1].said == "copied"


def test_a_part_that_holds_the_whole() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Owned()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x)

    tracer = type("Tracer", (fx.Tracer,), {"is_leaf_module": lambda *_: True})()
    net = Net()
    model = fx.GraphModule(net, tracer.trace(net))
    model.part.owner = (model,)
    copied = deep_copy(model)
    assert copied.part.owner == (copied,)
    assert copied(torch.zeros(1)) == 1


def test_what_can_not_be_copied_says_so() -> None:
    model = nn.Linear(2, 2)
    model.kept = model(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly"):
        deep_copy(model)
