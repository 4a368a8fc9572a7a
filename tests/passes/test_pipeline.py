"""Pipelines: as text, in their declared order, each promise held to the right model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

from fxqfix import passes
from fxqfix.errors import OptionError, PassError, UnknownNameError
from fxqfix.passes import (
    AvoidDefects,
    CutSites,
    EmulateEngine,
    FoldBatchNorm,
    FreezeQParams,
    PassResult,
    PinRanges,
    RestoreQParams,
    RestoreRange,
    Rewriter,
    SplitShared,
    chain,
    parse,
)

OURS = {n: p for n, p in passes.registry().items() if p.__module__.startswith("fxqfix.")}
ENGINE = ("avoid-defects", "emulate-engine")


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_pass_is_its_text(name: str) -> None:
    text = f"{name}{{engine=x86}}" if name in ENGINE else name
    (found,) = parse(text) if name != "insert-shadows" else (OURS[name](nn.ReLU()),)
    assert type(found) is OURS[name]
    assert str(found) == (text if name != "insert-shadows" else "insert-shadows{prepared=...}")


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (PinRanges(), "pin-ranges"),
        (PinRanges({"x": (0, 127)}), 'pin-ranges{ranges={"x":[0,127]}}'),
        (PinRanges({"a}b": (0, 1)}, "codes"), 'pin-ranges{ranges={"a}b":[0,1]} where=codes}'),
        (PinRanges(where="two words"), 'pin-ranges{where="two words"}'),
        (PinRanges(where="true"), 'pin-ranges{where="true"}'),
        (FreezeQParams(uncalibrated=True), "freeze-qparams{uncalibrated=true}"),
        (EmulateEngine("qnnpack", threads=2), "emulate-engine{engine=qnnpack threads=2}"),
        (CutSites(("a", "b")), 'cut-sites{sites=["a","b"]}'),
        (
            AvoidDefects("fbgemm", leave=frozenset({"b", "a"})),
            'avoid-defects{engine=fbgemm leave=["a","b"]}',
        ),
        (
            RestoreRange({"x": (0, 127), "é": (-1, 1)}),
            'restore-range{ranges={"x":[0,127],"\\u00e9":[-1,1]}}',
        ),
    ],
)
def test_options_go_to_text_and_back(step: passes.Pass, text: str) -> None:
    assert str(step) == text
    (back,) = parse(text)
    for option in fields(step):
        assert getattr(back, option.name) == getattr(step, option.name)
    assert parse(f" {text} , {text}") == (back, back)


def test_a_pipeline_is_read_in_its_order() -> None:
    found = parse("freeze-qparams,fold-batchnorm , pin-ranges{where=codes}")
    assert found == (FreezeQParams(), FoldBatchNorm(), PinRanges(where="codes"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a pass's name"),
        ("pin-ranges,", "a pass's name"),
        ("pin-ranges split-shared", "a comma"),
        ("pin-ranges{where=codes", "a closing brace"),
        ("pin-ranges{where}", "option=value"),
        ("pin-ranges{where=codes where=codes}", "option=value"),
        ("pin-ranges{were=codes}", "pin-ranges has no option 'were'. Expected: ranges, where"),
        ("split-shared{x=1}", "split-shared has no option 'x'. Expected: no option"),
        ("pin-ranges{ranges={]}", "a closing brace"),
        ("pin-ranges{ranges=[}", "a word, or a value in JSON"),
        ("emulate-engine", "emulate-engine needs engine"),
        ("graft-islands{donor=...}", "a word, or a value in JSON"),
    ],
)
def test_what_is_no_pipeline_is_refused(text: str, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(text)
    assert said in str(caught.value)


def test_an_unknown_pass_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="there is no pass 'pin-range'"):
        parse("pin-range")


def test_what_can_not_be_written_says_so() -> None:
    step = RestoreQParams(fx.symbolic_trace(nn.ReLU()), {"a": "b"})
    assert str(step) == 'restore-qparams{donor=... sites={"a":"b"}}'


def test_every_required_name_is_a_pass_and_the_order_has_no_circle() -> None:
    def behind(name: str, seen: tuple[str, ...]) -> None:
        assert name not in seen
        for other in OURS[name].requires:
            behind(other, (*seen, name))

    for name in OURS:
        behind(name, ())


def test_a_wrong_order_is_refused_before_anything_runs() -> None:
    with pytest.raises(PassError, match=r"fold-batchnorm stands before freeze-qparams"):
        chain(nn.ReLU(), FoldBatchNorm(), FreezeQParams())
    model = fx.symbolic_trace(nn.ReLU())
    assert not chain(model, FoldBatchNorm(), SplitShared()).modified  # neither freezes


class _Relu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


@dataclass(frozen=True)
class _Renames(passes.Pass):
    """Replaces the one call by its own negation, under its name."""

    seen: Any = None
    name: ClassVar[str] = ""

    def rewrite(self, rewriter: Rewriter) -> None:
        old = next(n for n in rewriter.graph.nodes if n.op == "call_function")
        with rewriter.graph.inserting_after(old):
            new = rewriter.call(torch.neg, old.args, "new")
        rewriter.replace(old, new, "negated", keep_name=True)

    def ensures(self, after: nn.Module) -> None:
        self.seen.append(("ensures", _calls(after)))

    def check(self, before: nn.Module, after: nn.Module) -> None:
        assert before is not after
        self.seen.append(("check", _calls(before), _calls(after)))


def _calls(model: Any) -> list[tuple[str, Any]]:
    return [(n.name, n.target) for n in model.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("owned", [False, True])
def test_check_sees_the_model_as_it_came_to_the_pass(owned: bool) -> None:
    seen: list[Any] = []
    relu, neg = [("relu", torch.relu)], [("relu", torch.neg)]
    chain(fx.symbolic_trace(_Relu()), _Renames(seen), _Renames(seen), owned=owned)
    assert seen == [("ensures", neg), ("check", relu, neg), ("ensures", neg), ("check", neg, neg)]


def test_a_hook_sees_each_pass_with_what_it_alone_did() -> None:
    seen: list[tuple[passes.Pass, PassResult]] = []
    steps = SplitShared(), _Renames([])
    result = chain(fx.symbolic_trace(_Relu()), *steps, between=lambda *both: seen.append(both))
    assert [step for step, _ in seen] == list(steps)
    assert [found.edits for _, found in seen] == [(), ("relu: negated",)]
    assert [found.modified for _, found in seen] == [False, True]
    assert seen[-1][1].graph_module is result.graph_module


def test_replace_keeps_the_name_where_it_is_asked_to() -> None:
    model = fx.symbolic_trace(_Relu())
    kept = chain(model, _Renames([])).graph_module
    assert [n.name for n in kept.graph.nodes] == ["x", "relu", "output"]
    assert torch.equal(kept(torch.ones(2)), -torch.ones(2))
