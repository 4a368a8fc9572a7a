"""What a check is: it reads a prepared model's state, without data, and says what it finds.

A check is a row: its code, a sentence, and the function that yields findings. Checks see one
reading of the model, which is made once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx, nn

from fxqfix import ops
from fxqfix._notebook import Shown
from fxqfix.dialects import Reading, Tap, int8, parents
from fxqfix.dialects._base import modules_of
from fxqfix.dialects.weights import holder
from fxqfix.engines import Call, placed
from fxqfix.names import Severity
from fxqfix.qparams import QParams

__all__ = ["SEVERITIES", "Check", "Finding", "Subject"]

_JUDGED = ("weighted", "pool", "activation")
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding(Shown):
    """One thing that a check found.

    Attributes:
        code: The check's code: the name of the cause that it leads to, where there is one.
        severity: "error": the converted model will compute something else, or will not run;
            "warning": it may, on some data or CPUs; "info": worth knowing.
        site: Name of the site, path of the module, or "" for the whole model.
        evidence: The numbers that it rests on.
        remedy: What to do.

    Example:
        >>> from fxqfix.checks import Finding
        >>> Finding("uncalibrated", "error", "conv", "min=inf, max=-inf", "calibrate").severity
        'error'
    """

    code: str
    severity: Severity
    site: str
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Subject:
    """What the checks read.

    Attributes:
        reading: The prepared model, read once.
        engine: The engine that it will be converted for.
        training: Whether the model as a whole is in train mode: what is normal then is not found.
    """

    reading: Reading
    engine: str
    training: bool

    @property
    def graph_module(self) -> fx.GraphModule:
        """The model's graph."""
        return self.reading.graph_module

    @property
    def exported(self) -> bool:
        """Whether it is a model of the PT2E flow, whose ops run on no engine's own kernels."""
        return self.reading.exported

    @property
    def toolbox(self) -> str:
        """Where the helpers are that switch this flow's observers and fake-quants."""
        return "torchao.quantization.pt2e" if self.exported else "torch.ao.quantization"

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """All modules by path."""
        return modules_of(self.graph_module)

    @cached_property
    def taps(self) -> dict[fx.Node, Tap]:
        """The activation sites by their quantizer's node."""
        return {tap.node: tap for tap in self.reading.activations}

    @cached_property
    def calls(self) -> list[tuple[Tap | None, Call]]:
        """The ops as the kernels of a CPU without VNNI will get them, and their weights' taps."""
        weights = {tap.node: tap for tap in self.reading.weights}
        found = []
        for node, match in self.matches.items():
            ups = list(parents(node.all_input_nodes, self.taps))
            if match.spec.family in _JUDGED and ups and ups[0].site.used is not None:
                call = self._call(node, match, ups[0].site.used, weights.get(node))
                found.append((weights.get(node), call))
        return found

    def _call(self, node: fx.Node, match: ops.Match, grid: QParams, tap: Tap | None) -> Call:
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        weight = tap.weight() if tap is not None and tap.weight is not None else None
        given = {} if module is not None else int8.arguments(node, self.graph_module)
        if module is None and weight is not None:
            given |= _per_axis(given, weight.codes.dim())
        call = Call(
            node.name,
            self.engine,
            match.spec.key,
            relu=match.relu,
            arguments=given,
            module=holder(module) if module is not None else None,
            qparams=(grid,),
            weight=weight,
        )
        return placed(call, self.engine, "avx2")

    @cached_property
    def matches(self) -> dict[fx.Node, ops.Match]:
        """What each node spells, where the op table knows it."""
        found = {n: ops.match_node(n, self.modules) for n in self.graph_module.graph.nodes}
        return {n: m for n, m in found.items() if m is not None}


def _per_axis(given: Mapping[str, Any], dims: int) -> dict[str, Any]:
    """Options of a functional convolution as kernels hold them: a number per axis, none missing."""
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
    found = {name: given.get(name, default) for name, default in defaults.items()}
    return {n: (v,) * (dims - 2) if isinstance(v, int) else v for n, v in found.items()}


@dataclass(frozen=True)
class Check:
    """A row of the checks.

    Attributes:
        code: Its name in findings.
        summary: What it looks for, in one sentence.
        run: Yields the findings.

    Example:
        >>> from fxqfix.checks import registry
        >>> next(check.summary for check in registry() if check.code == "uncalibrated")
        'an observer that never saw data'
    """

    code: str
    summary: str
    run: Callable[[Subject], Iterator[Finding]]
