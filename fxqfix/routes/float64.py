"""Route "float64": the graph's own ops in float64, the noise floor of every other route.

Float sums depend on their order, which a kernel, a thread count or a compiler chooses, and each
order rounds some values to the other side of a tie. The codes that differ here are those that the
graph's own arithmetic gives otherwise than exact arithmetic would: no deployed form can be
asked to agree with the graph better than that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fxqfix.measure import tensors_of
from fxqfix.routes._base import Deployed, Route
from fxqfix.routes._wide import Wide

__all__ = ["ROUTE"]

_NOTE = "nothing is deployed: the graph's own ops, between the same quantize ops"


def _deploy(graph_module: fx.GraphModule, batch: tuple[Any, ...], dynamic: object) -> Deployed:
    own = [t.dtype for t in tensors_of([copy.deepcopy(graph_module)(*batch)])]

    def run(*inputs: Any) -> Sequence[Tensor]:
        outputs = tensors_of([Wide(graph_module).run(*inputs)])
        return [t.to(dtype) for t, dtype in zip(outputs, own, strict=True)]

    return Deployed(run, notes=(_NOTE,))


ROUTE = Route(
    name="float64",
    summary="the graph's own ops in float64: the noise floor of every other route",
    deploy=_deploy,
    anywhere=True,
)
