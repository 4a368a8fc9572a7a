"""What test suites need: a deployed form held to what was trained, a pass to its promises."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import _rng, _torch, causes
from fxqfix._settings import entry
from fxqfix.errors import CheckError, PassError, UnknownNameError
from fxqfix.flows import compare
from fxqfix.measure import tensors_of
from fxqfix.names import Engine
from fxqfix.passes import Pass, PassResult
from fxqfix.report import ALLOWED, Certificate, Report
from fxqfix.routes import Deployer, Route, certify

__all__ = ["assert_deployed", "check_pass"]


@entry
def assert_deployed(
    prepared: nn.Module,
    route: str | nn.Module | Deployer | Route,
    data: Iterable[Any],
    *,
    allow: Collection[str] | None = None,
    max_lsb: int = 1,
    engine: Engine | None = None,
) -> Certificate | Report:
    """Hold a deployment to what was trained: raise where it computes another thing.

    Args:
        prepared: The prepared model; it is not changed.
        route: As for `certify`, a name or your own; or the converted model, as for `compare`.
        data: Batches, as for both.
        allow: The causes that codes may differ by, and no others; None for those that leave a
            certificate or a report ok (`fxqfix.report.ALLOWED`). What is inherited (upstream) is
            judged where it is born.
        max_lsb: How far two codes may be apart, given the same inputs.
        engine: For a converted model: the engine that it runs on.

    Returns:
        The certificate or the report, for further tests.

    Raises:
        CheckError: It is not, or something was left out; an AssertionError that shows the table.
        UnknownNameError: `allow` names no cause.

    Example:
        >>> from torch.ao.quantization import get_default_qat_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import prepare_qat_fx
        >>> x = torch.linspace(-1, 1, 16).reshape(2, 8)
        >>> net = nn.Sequential(nn.Linear(8, 2)).train()
        >>> prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
        >>> _ = prepared(x)
        >>> assert_deployed(prepared.eval(), "export", [x]).exact
        True
    """
    known = [cause.name for cause in causes.registry()]
    for name in allow or ():
        if name not in known:
            raise UnknownNameError(
                f"no cause is named {name!r}", where="assert_deployed", expected=", ".join(known)
            )
    result: Certificate | Report
    if isinstance(route, nn.Module):
        result = compare(prepared, route, data, engine=engine, progress=False)
    else:
        result = certify(prepared, route, data, progress=False)
    problems = [*_not_allowed(result, allow, max_lsb), *result.left_out]
    if problems:
        error = CheckError(
            "what is deployed is not what was trained",
            where="assert_deployed",
            found="; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else ""),
            remedy="allow= takes causes that you accept, max_lsb= a larger difference",
        )
        error.args = (f"{error}\n\n{result}",)
        raise error
    return result


def _not_allowed(
    result: Certificate | Report, allow: Collection[str] | None, max_lsb: int
) -> list[str]:
    """The faults of a result under other rules than its own."""
    allowed = ALLOWED[type(result).__name__] if allow is None else {*allow, "upstream"}
    found = {name: f"{name}: {count} codes" for name, count in result.causes.items()}
    own = [fault for fault in result.faults if fault not in found.values()]
    if isinstance(result, Certificate):
        own = [fault for fault in own if not fault.startswith("codes are up to ")]
        apart = result.max_lsb
    else:
        rows = [row.local for row in result.rows if row.local is not None]
        apart = max((local.max_lsb for local in rows), default=0)
    if "range-lost" in allowed:
        own = [fault for fault in own if " codes out of range" not in fault]
    said = [text for name, text in found.items() if name not in allowed]
    far = [f"codes are up to {apart} apart on the same inputs"] if apart > max_lsb else []
    return [*said, *far, *own]


def check_pass(step: Pass, model: nn.Module, *inputs: Any, same_bits: bool = True) -> PassResult:
    """Run a pass, and hold it to what every pass promises.

    Its name is kebab-case, and it equals its copy. The model stays as it is (graph, parameters,
    buffers, modes), and so does the random state. `modified` is whether there are edits. Run on its
    own result, the pass edits nothing. The result computes what the model does, to the bit.

    Args:
        step: The pass.
        model: What it is run on; it is not changed, or the check fails.
        inputs: Positional arguments of the model, of any shape; without any, outputs are not
            compared. Models and inputs are copied before they run.
        same_bits: Whether the pass promises to change no output bit.

    Returns:
        What the pass returned.

    Raises:
        PassError: A promise is broken; the message says which.

    Example:
        >>> from fxqfix.passes import FoldBatchNorm
        >>> result = check_pass(FoldBatchNorm(), fx.symbolic_trace(nn.ReLU()), torch.ones(2))
        >>> result.modified
        False
    """
    _hold(step, bool(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", step.name)), "its name is kebab-case")
    _hold(step, copy.copy(step) == step, "it equals its copy")
    state, random = _state(model), torch.get_rng_state()
    result = step(model)
    _hold(step, _equal(state, _state(model)), "the model that it is given stays as it is")
    _hold(step, torch.equal(random, torch.get_rng_state()), "the random state stays as it is")
    _hold(step, result.modified == bool(result.edits), "modified says whether there are edits")
    again = step(result.graph_module).edits
    _hold(step, not again, "run on its own result, it edits nothing", found=again)
    if inputs and same_bits:
        wanted, found = (_outputs(m, inputs) for m in (model, result.graph_module))
        _hold(step, _equal(wanted, found), "the result computes the same bits")
    return result


def _hold(step: Pass, kept: bool, promise: str, found: object = None) -> None:
    if not kept:
        raise PassError("a promise is broken", where=step.name, expected=promise, found=found)


def _state(model: nn.Module) -> list[Any]:
    """Whatever a pass could change, copied."""
    state: list[Any] = [(path, m.training) for path, m in model.named_modules()]
    tensors = (*model.named_parameters(), *model.named_buffers())
    state += [item for name, value in tensors for item in (name, value.detach().clone())]
    if isinstance(model, fx.GraphModule):
        state += [str(node.format_node()) for node in model.graph.nodes] + [model.code]
    return state


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """What a copy of the model gives for copies of the inputs; the random state is put back."""
    with torch.no_grad(), _rng.same_rng():
        given = _torch.tree_map_tensors(Tensor.clone, inputs)
        return list(tensors_of([copy.deepcopy(model)(*given)]))


def _equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.is_floating_point():
        return torch.equal(a.nan_to_num(0), b.nan_to_num(0)) and torch.equal(a.isnan(), b.isnan())
    return torch.equal(a, b)
