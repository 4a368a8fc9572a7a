"""Route "export": torch.export, saved to a .pt2 file and loaded from it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix import _torch
from fxqfix.measure import tensors_of
from fxqfix.routes._base import Deployed, Route

__all__ = ["ROUTE", "exported"]


def exported(
    graph_module: fx.GraphModule, batch: tuple[Any, ...], dynamic: bool
) -> torch.export.ExportedProgram:
    """Export a graph for one batch; with `dynamic`, for any size of its first dimension.

    Args:
        graph_module: The graph; a copy is exported.
        batch: Its inputs.
        dynamic: Whether the first dimension of every input may vary.
    """
    shapes = None
    if dynamic:
        first = torch.export.Dim("batch")
        shapes = tuple({0: first} if isinstance(v, Tensor) and v.dim() else None for v in batch)
        # A size of 1 would be taken for a constant.
        batch = tuple(torch.cat([v, v]) if isinstance(v, Tensor) and v.dim() else v for v in batch)
    with _torch.quiet():  # it warns of how torch's own modules keep their weights
        return torch.export.export(graph_module, batch, dynamic_shapes=shapes)


def _deploy(graph_module: fx.GraphModule, batch: tuple[Any, ...], dynamic: bool) -> Deployed:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        program = exported(graph_module, batch, dynamic)
        with _torch.quiet():  # some builds warn of buffers that the file gives them read-only
            torch.export.save(program, path)
            loaded = torch.export.load(path).module()

    def run(*inputs: Any) -> Sequence[Tensor]:
        return list(tensors_of([loaded(*inputs)]))

    note = "the graph's own ops: float arithmetic between dequantize and quantize"
    return Deployed(run, notes=(note,))


ROUTE = Route(
    name="export",
    summary="torch.export, saved to a .pt2 file and loaded from it",
    deploy=_deploy,
    anywhere=True,
)
