"""Route "export": torch.export, saved to a .pt2 file and loaded from it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim

from fxqfix import _torch
from fxqfix.dialects import Reading
from fxqfix.errors import OptionError
from fxqfix.measure import tensors_of
from fxqfix.routes._base import Deployed, Route

__all__ = ["ROUTE", "Axes", "Dynamic", "axes_of", "exported", "fixed_sizes", "open_axes"]

# What torch.export takes as dynamic_shapes: per input, in order (or by name), axis -> Dim.
Axes = Sequence[Any] | Mapping[str, Any]
Dynamic = bool | Axes  # whether the first axis of every input is open, or which axes are


def open_axes(reading: Reading, given: Axes | None, batch: bool) -> Dynamic:
    """One entry per input of a graph, in order.

    Args:
        reading: The graph's.
        given: What the user gave, by place or by name; None for `batch`.
        batch: Whether the first axis of every input is open.

    Raises:
        OptionError: It has more entries than there are inputs, or another name.
    """
    if given is None:
        return batch
    nodes = [n for n in reading.graph_module.graph.nodes if n.op == "placeholder"]
    names = [str(n.target) for n in nodes]
    known = set(given) <= set(names) if isinstance(given, Mapping) else len(given) <= len(names)
    if not known or not given:
        raise OptionError(
            "dynamic_shapes does not fit the model's inputs",
            where="dynamic_shapes",
            found=sorted(given) if isinstance(given, Mapping) else f"{len(given)} entries",
            expected=f"one entry per input, of {', '.join(names)}",
        )
    if isinstance(given, Mapping):
        return tuple(given.get(name) for name in names)
    return (*given, *(None for _ in names[len(given) :]))


def axes_of(given: Any) -> set[int]:
    """The axes that an entry of `Axes` leaves open."""
    pairs = given.items() if isinstance(given, Mapping) else enumerate(given or ())
    return {axis for axis, dim in pairs if dim is not None and dim is not Dim.STATIC}


def fixed_sizes(batch: tuple[Any, ...], dynamic: Dynamic) -> list[Any]:
    """The sizes of a batch that a deployed form is made for.

    Args:
        batch: The inputs.
        dynamic: As for `exported`.
    """
    shapes = [tuple(t.shape) for t in tensors_of(batch)]
    if isinstance(dynamic, bool):
        return [shape[int(dynamic) :] for shape in shapes]
    if len(dynamic) != len(shapes):  # nested inputs: export knows
        return []
    return [
        [size for axis, size in enumerate(shape) if axis not in axes_of(given)]
        for shape, given in zip(shapes, dynamic, strict=True)
    ]


def exported(
    graph_module: fx.GraphModule, batch: tuple[Any, ...], dynamic: Dynamic
) -> torch.export.ExportedProgram:
    """Export a graph for one batch; with `dynamic`, for any size of its first dimension.

    Args:
        graph_module: The graph; a copy is exported.
        batch: Its inputs.
        dynamic: Whether the first dimension of every input may vary, or which axes may. Bounds that
            the graph itself has hold for the program too.
    """
    if not dynamic:
        return _export(graph_module, batch, None)
    if not isinstance(dynamic, bool):
        more = [_any_size(value) for value in batch[len(dynamic) :]]  # codes of a graph cut
        return _export(graph_module, batch, (*dynamic, *more))
    # A size of 1 would be taken for a constant.
    batch = tuple(torch.cat([v, v]) if _batched(v) and v.shape[0] == 1 else v for v in batch)
    first = Dim("batch")
    try:
        return _export(
            graph_module, batch, tuple({0: first} if _batched(v) else None for v in batch)
        )
    except Exception:
        # The graph may have bounds of its own, or axes that are no multiple of the batch.
        nodes = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        codes = [node.name.endswith("_codes") for node in nodes]
        if len(codes) != len(batch):
            raise
        shapes = tuple(
            _any_size(v) if cut else {0: Dim.DYNAMIC} if _batched(v) else None
            for v, cut in zip(batch, codes, strict=True)
        )
        try:
            return _export(graph_module, batch, shapes)
        except Exception:  # the first one says it in the user's terms
            pass
        raise


def _export(graph_module: fx.GraphModule, batch: Any, shapes: Any) -> torch.export.ExportedProgram:
    with _torch.quiet():  # it warns of how torch's own modules keep their weights
        return torch.export.export(graph_module, batch, dynamic_shapes=shapes)


def _batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _any_size(value: Any) -> Any:
    return dict.fromkeys(range(value.dim()), Dim.AUTO) if isinstance(value, Tensor) else None


def _deploy(graph_module: fx.GraphModule, batch: tuple[Any, ...], dynamic: Dynamic) -> Deployed:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        program = exported(graph_module, batch, dynamic)
        with _torch.quiet():  # some builds warn of buffers that the file gives them read-only
            torch.export.save(program, path)
            loaded = torch.export.load(path).module()

    def run(*inputs: Any) -> Sequence[Tensor]:
        return list(tensors_of([loaded(*inputs)]))

    note = "the graph's own ops: float arithmetic between dequantize and quantize"
    return Deployed(run, notes=(note,), state=loaded)


ROUTE = Route(
    name="export",
    summary="torch.export, saved to a .pt2 file and loaded from it",
    deploy=_deploy,
    anywhere=True,
)
