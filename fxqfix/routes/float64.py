"""Route "float64": the graph's own ops in float64, the noise floor of every other route.

Float32 sums depend on their order, which a kernel, a thread count or a compiler chooses, and each
order rounds some values to the other side of a tie. The codes that differ here are those that the
graph's own float32 arithmetic gives otherwise than exact arithmetic would: no deployed form can be
asked to agree with the graph better than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix.measure import tensors_of
from fxqfix.routes._base import Deployed, Route
from fxqfix.routes._wide import Wide

__all__ = ["ROUTE"]

_NOTE = "nothing is deployed: the graph's own ops, between the same quantize ops"


def _deploy(graph_module: fx.GraphModule, batch: tuple[Any, ...], dynamic: bool) -> Deployed:
    def run(*inputs: Any) -> Sequence[Tensor]:
        outputs = tensors_of([Wide(graph_module).run(*inputs)])
        return [t.to(torch.float32) if t.dtype == torch.float64 else t for t in outputs]

    return Deployed(run, notes=(_NOTE,))


ROUTE = Route(
    name="float64",
    summary="the graph's own ops in float64: the noise floor of every other route",
    deploy=_deploy,
)
