"""Routes "onnxruntime" and "onnxruntime:LEVEL": torch.onnx.export, run by ONNX Runtime.

The exporter drops quant_min and quant_max at every level. A prepared model gets its clamps on
codes: ONNX Runtime fuses QLinearConv, QGemm and their like from level "extended" on, and around
clamps on values it fuses none. The certificate's kernels are those of its optimized graph.

From level "basic" on biases become int32, even where the convolution then runs in float, and
weights that the graph leaves in float become int8. On CPUs without VNNI the int8 kernels saturate
at 16 bits; the session option session.x64quantprecision makes them exact, and slower.

The opset is the exporter's own; codes of 16 bits need 21 and get it, and
`certify(..., opset=...)` takes any that the exporter can write the graph in.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix import _extras, _torch
from fxqfix.dialects.decomposed import arguments, is_pin, is_quantize
from fxqfix.errors import RouteError
from fxqfix.measure import tensors_of
from fxqfix.passes import PinRanges
from fxqfix.routes._base import Deployed, Route
from fxqfix.routes.export import Dynamic, exported

__all__ = ["ROUTES"]

# ONNX Runtime's levels of graph optimization; "" is its default.
_LEVELS = {
    "": "ORT_ENABLE_ALL",
    "disable_all": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
}
_FLOAT = "no kernel computes on integers: what is between dequantize and quantize runs in float"
_WITH_16_BITS = 21  # the first opset whose QuantizeLinear takes them
_ON_VALUES = (
    "its ranges are clamped on values, around which ONNX Runtime fuses no int8 kernel: "
    'pin_ranges="codes" of to_decomposed and migrate (--pins codes) clamps codes'
)
_LOGGERS = ("torch.onnx", "onnxscript")
_ERRORS_ONLY = 3  # of ONNX Runtime's levels of logging


def _deploy(
    graph_module: fx.GraphModule,
    batch: tuple[Any, ...],
    dynamic: Dynamic,
    level: str,
    opset: int | None = None,
) -> Deployed:
    runtime = _extras.require("onnxruntime", "onnx", "certify, route onnxruntime")
    onnx = _extras.require("onnx", "onnx", "certify, route onnxruntime")
    _extras.require("onnxscript", "onnx", "certify, route onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, _LEVELS[level])
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = _ERRORS_ONLY
    with tempfile.TemporaryDirectory() as folder:
        path, optimized = (str(Path(folder) / name) for name in ("model.onnx", "optimized.onnx"))
        with _silence(), _torch.quiet():
            program = exported(graph_module, batch, dynamic)
            given: Any = {"dynamo": True, "verbose": False, "external_data": False}
            torch.onnx.export(program, (), path, opset_version=opset or _opset(program), **given)
        _check_opset(opset, onnx.load(path).opset_import)
        options.optimized_model_filepath = optimized
        session = runtime.InferenceSession(path, options, ["CPUExecutionProvider"])
        kinds = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: Any) -> Sequence[Tensor]:
        values = (t.detach().cpu().numpy() for t in tensors_of(inputs))
        found = session.run(None, dict(zip(names, values, strict=True)))
        return [torch.from_numpy(value) for value in found]

    kernels = tuple(sorted((kind, n) for kind, n in kinds.items() if _on_integers(kind)))
    notes: tuple[str, ...] = () if kernels else (_FLOAT,)
    if notes and any(map(is_pin, graph_module.graph.nodes)):
        notes = (*notes, _ON_VALUES)
    return Deployed(run, kernels, notes)


def _check_opset(asked: int | None, written: Iterable[Any]) -> None:
    """Refuse a file of another opset: where it can't convert a graph, the exporter leaves it."""
    found = next(entry.version for entry in written if entry.domain in ("", "ai.onnx"))
    if asked is not None and found != asked:
        raise RouteError(
            f"the exporter can't write this graph in opset {asked}",
            where="certify, route onnxruntime",
            found=f"it wrote opset {found}",
            remedy=f"leave opset out, or ask for {found} or a later one",
        )


def _opset(program: torch.export.ExportedProgram) -> int | None:
    """The lowest opset that has the ops of a program; None for the exporter's own."""
    nodes = filter(is_quantize, program.graph.nodes)
    wide = any(arguments(node)["dtype"].itemsize == 2 for node in nodes)
    return _WITH_16_BITS if wide else None


def _on_integers(kind: str) -> bool:
    """Whether an ONNX op computes on codes: QLinearConv, QGemm, ConvInteger and their like."""
    return kind.startswith(("QLinear", "QGemm")) or "Integer" in kind


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter prints its progress, and logs which libraries it could have used."""
    before = {logging.getLogger(name): logging.getLogger(name).level for name in _LOGGERS}
    try:
        for logger in before:
            logger.setLevel(logging.CRITICAL)  # what fails is raised
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


ROUTES = tuple(
    Route(
        name=":".join(filter(None, ("onnxruntime", level))),
        summary=f"torch.onnx.export, then ONNX Runtime with {_LEVELS[level]}"
        + ("" if level else ", its default"),
        deploy=partial(_deploy, level=level),
        extra="onnx",
        lapses=("weight-int8", "bias-int32", "int16-saturation"),
        passes=(PinRanges(where="codes"),),
        packages=("onnxruntime", "onnx", "onnxscript"),
    )
    for level in _LEVELS
)
