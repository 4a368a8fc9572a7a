"""A random case as plain data: a plan and a recipe of `tests.strategies`, a flow, the inputs' form.

A spec prints, is written as JSON, is drawn from a seed, and gets smaller step by step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import Plan, Recipe, Step, batch, plans, recipes

FLOWS = ("fx", "fx", "fx", "eager", "pt2e")
# How torchao quantizes; tests/dialects/pt2e_nets.py has them.
MODES = ("x86", "x86-reduced", "x86-qat", "xnnpack", "xnnpack-tensor", "bias-int32", "sub-8-bit")


@dataclass(frozen=True)
class Spec:
    """A network, how it is quantized, and the form of its inputs.

    Attributes:
        plan: The network.
        recipe: How FX and eager mode prepare it; of PT2E only the engine counts.
        flow: "fx", "eager" or "pt2e".
        mode: The quantizer of PT2E.
        images: How many images a batch has.
        channels_last: Whether they lie channels-last.
    """

    plan: Plan
    recipe: Recipe
    flow: str = "fx"
    mode: str = ""
    images: int = 2
    channels_last: bool = False

    def inputs(self, seed: int = 0, gain: float = 1.0) -> tuple[Tensor, ...]:
        """The images of a batch."""
        found = [batch(seed + 1000 * i, gain, self.images) for i in range(self.plan.inputs)]
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        return tuple(x.contiguous(memory_format=form) for x in found)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """The spec of a line."""
        given = json.loads(text)
        plan = given["plan"] | {"steps": tuple(map(_step, given["plan"]["steps"]))}
        recipe = {k: tuple(v) if isinstance(v, list) else v for k, v in given["recipe"].items()}
        return cls(**given | {"plan": Plan(**plan), "recipe": Recipe(**recipe)})

    def smaller(self) -> Iterator[Spec]:
        """Specs that are simpler by one thing, the simplest first."""
        yield from (replace(self, plan=p) for p in _shorter(self.plan))
        plain = Recipe(self.recipe.qat, converts=self.recipe.converts)
        for name in (f.name for f in fields(Recipe) if f.name not in ("qat", "converts")):
            if getattr(self.recipe, name) != getattr(plain, name):
                own = replace(self.recipe, **{name: getattr(plain, name)})
                yield replace(self, recipe=own)
        if self.channels_last:
            yield replace(self, channels_last=False)
        if self.images > 1:
            yield replace(self, images=1)


def _step(given: dict[str, Any]) -> Step:
    options = ((k, _step(v) if isinstance(v, dict) else v) for k, v in given["options"])
    return Step(given["kind"], tuple(options))


def _shorter(plan: Plan) -> Iterator[Plan]:
    for i in range(len(plan.steps)):
        kept = [s for j, s in enumerate(plan.steps) if j != i]
        if all(_of(s) < i for s in kept):  # others are called by their number
            yield replace(plan, steps=tuple(kept))
    if plan.head != "image":
        yield replace(plan, head="image")
    if plan.inputs > 1:
        yield replace(plan, inputs=1)
    for i, step in enumerate(plan.steps):
        given = dict(step.options)
        for name, value in _PLAIN.items():
            if name in given and given[name] != value:
                own = Step(step.kind, tuple(sorted((given | {name: value}).items())))
                yield replace(plan, steps=(*plan.steps[:i], own, *plan.steps[i + 1 :]))


_PLAIN = {
    "kernel": 1,
    "dilation": 1,
    "stride": 1,
    "groups": "one",
    "bn": False,
    "bias": False,
    "mode": "zeros",
    "relu": "no",
}


def _of(step: Step) -> int:
    return int(dict(step.options).get("of", -1))


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any spec."""
    flow = draw(st.sampled_from(FLOWS))
    recipe = draw(recipes(wide=True))
    mode = draw(st.sampled_from(MODES)) if flow == "pt2e" else ""
    plan = draw(plans(most=5, qat=recipe.qat, wide=draw(st.sampled_from([True, True, False]))))
    if flow == "eager":
        plan = replace(plan, inputs=1)
    images = draw(st.sampled_from([1, 2, 3]))
    return Spec(
        plan, recipe, flow, mode, images, draw(st.sampled_from([False, False, False, True]))
    )


def drawn(seed: int, count: int = 20) -> list[Spec]:
    """Specs of a seed, always the same."""
    found: list[Spec] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(specs())
    def collect(spec: Spec) -> None:
        found.append(spec)

    collect()
    return list(dict.fromkeys(found))
