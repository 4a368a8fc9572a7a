"""What fxqfix needs of the PT2E flow: torchao's, or torch's own where it still has one.

Nothing of either is imported before a model of that flow is met.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxqfix import _torch
from fxqfix.errors import MissingDependencyError

__all__ = ["convert", "derived_from", "is_blockwise", "is_program", "origins", "own_annotations"]

_TORCHAO = "torchao.quantization.pt2e"
_CONVERSIONS = (
    f"{_TORCHAO}.quantize_pt2e.convert_pt2e",
    "torch.ao.quantization.quantize_pt2e.convert_pt2e",
)
# Keys of node.meta: what the quantizer wants of a node, and the nodes that a node was made from.
_ANNOTATION, _FROM = "quantization_annotation", "from_node"


def is_program(model: object) -> bool:
    """True for a torch.export.ExportedProgram."""
    return isinstance(model, torch.export.ExportedProgram)


def is_blockwise(module: nn.Module) -> bool:
    """True for torchao's quantizers by blocks, groups or tokens, whose grids are no QParams."""
    observer = getattr(module, "activation_post_process", module)
    return isinstance(observer, _torch.torchao_bases("AffineQuantizedObserverBase"))


def convert(prepared: fx.GraphModule) -> fx.GraphModule:
    """Run convert_pt2e on a copy of a prepared model, which is used up.

    torchao's where torchao's observers can be in the model, because it is imported; else torch's
    own, else torchao's.

    Raises:
        MissingDependencyError: Neither is installed.
    """
    first, second = _CONVERSIONS if _TORCHAO in sys.modules else _CONVERSIONS[::-1]
    found = _torch.resolve(first) or _torch.resolve(second)
    if found is None:
        raise MissingDependencyError(
            "no convert_pt2e is installed",
            where="convert",
            expected="torchao, or a torch whose torch.ao.quantization still has it",
            remedy='pip install "fxqfix[pt2e]"',
        )
    own_annotations(prepared)
    converted: fx.GraphModule = found(prepared)
    return converted


def own_annotations(model: nn.Module) -> None:
    """Let a copied graph's quantizer annotations speak of its own nodes.

    copy.deepcopy leaves them keyed by the nodes of the graph that was copied, and convert_pt2e
    then fails on every dynamically quantized op ("No chose qparams node found").

    Args:
        model: A copy; any other model, and graphs without annotations, are left alone.
    """
    if not isinstance(model, fx.GraphModule):
        return
    own = {node.name: node for node in model.graph.nodes}
    for node in model.graph.nodes:
        annotation = node.meta.get(_ANNOTATION)
        wanted: Mapping[fx.Node, Any] | None = getattr(annotation, "input_qspec_map", None)
        if annotation is None or wanted is None:
            continue
        mine = {own[n.name]: spec for n, spec in wanted.items() if n.name in own}
        node.meta[_ANNOTATION] = dataclasses.replace(annotation, input_qspec_map=mine)


def origins(node: fx.Node) -> frozenset[str]:
    """Names of the nodes that a node was made from, as convert_pt2e and torch.export record it."""
    return frozenset(_names(node.meta.get(_FROM) or ()))


def _names(sources: Iterable[Any]) -> Iterator[str]:
    for source in sources:
        yield str(source.name)
        yield from _names(source.from_node or ())


def derived_from(module: nn.Module) -> list[nn.Module] | None:
    """The quantizers that a quantizer derives its qparams from (a bias's, say); None for others.

    The list is the module's own: what is put into it is asked from then on.
    """
    found = getattr(module, "obs_or_fqs", None)
    return found if isinstance(found, list) else None
