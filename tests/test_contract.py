"""The public signatures that others rely on: names, order, defaults; more keywords may come."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import fxqfix


def _contract() -> dict[str, Callable[..., Any]]:
    def trace(model, example_inputs=None): ...
    def inspect(model): ...
    def lint(prepared, *, engine=None): ...
    def freeze(prepared): ...
    def to_decomposed(model, *, ranges_from=None, pin_ranges=True): ...
    def to_int8(prepared, *, engine=None, backend_config=None): ...
    def compare(
        prepared,
        converted,
        data,
        *,
        engine=None,
        local=True,
        attribute=True,
        noise_floor="first",
        culprits=0,
        float_model=None,
        process_group=None,
        progress=None,
    ): ...
    def repair(prepared, converted, *, data=None, backend_config=None): ...
    def emulate(converted, *, engine=None, isa=None, threads=None): ...
    def as_deployed(prepared, *, engine=None, isa=None, threads=None): ...
    def certify(model, route, data): ...
    def extract_parameters(model): ...
    def golden_vectors(model, inputs): ...
    def judge(parameters, answers, *, golden=None): ...
    def certificate_of(model): ...
    def validate(model, data, metric): ...
    def Monitor(prepared, data, *, every=100, writer=None, stop_on=None): ...

    return {name: value for name, value in locals().items() if callable(value)}


CONTRACT = _contract()


@pytest.mark.parametrize("name", CONTRACT)
def test_a_signature_is_what_was_promised(name: str) -> None:
    found = inspect.signature(getattr(fxqfix, name)).parameters
    wanted = inspect.signature(CONTRACT[name]).parameters
    positional = [p for p, v in wanted.items() if v.kind is v.POSITIONAL_OR_KEYWORD]
    assert list(found)[: len(positional)] == positional
    for parameter, value in wanted.items():
        assert found[parameter].kind is value.kind, parameter
        assert found[parameter].default == value.default, parameter
    more = found.keys() - wanted.keys()
    assert all(found[p].default is not inspect.Parameter.empty for p in more)
