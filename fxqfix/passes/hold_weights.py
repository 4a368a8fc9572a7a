"""hold-weights: weights that conversion would quantize otherwise than their fake-quant does.

torch quantizes the weights of int8 modules to the whole of qint8, -128 included, whatever range
their fake-quant has (symmetric ones are often [-127,127]). A weight that trained on behind its
observer then gets a code that was never trained. And where the native quantize op adds the zero
point before it rounds, an odd one sends a tie to the other side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxqfix.dialects.weights import batch_norm_factor, holder
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._frozen import FrozenFakeQuantize
from fxqfix.qparams import QParams, dequantize, quantize, quantize_native

__all__ = ["HoldWeights"]


@dataclass(frozen=True)
class HoldWeights(Pass):
    """Replace weights and constants that conversion would give other codes than training does.

    They get the values that their fake-quants give: the limit of the range for what lies beyond
    it, the quantized value for a tie. No bit of the model's outputs changes. A weight that has
    several readers is left as it is, unless all of them quantize it alike.

    Example:
        >>> import torch
        >>> from fxqfix import QParams
        >>> from fxqfix.passes import FrozenFakeQuantize, HoldWeights
        >>> from torch.ao.nn.qat import Linear
        >>> from torch.ao.quantization import default_qat_qconfig
        >>> linear = Linear(1, 1, bias=False, qconfig=default_qat_qconfig)
        >>> linear.weight_fake_quant = FrozenFakeQuantize(QParams(0.5, 0, -127, 127, torch.qint8))
        >>> linear.weight.data.fill_(-64.0).item()
        -64.0
        >>> HoldWeights()(torch.nn.Sequential(linear)).graph_module[0].weight.item()
        -63.5
    """

    name: ClassVar[str] = "hold-weights"
    requires: ClassVar[tuple[str, ...]] = (
        "freeze-qparams",
        "fold-batchnorm",
    )

    def rewrite(self, rewriter: Rewriter) -> None:
        """Go through the weights."""
        readers: dict[int, list[tuple[str, Tensor, QParams | None]]] = {}
        for path, weight, qparams in _readers(rewriter.module):
            readers.setdefault(id(weight), []).append((path, weight, qparams))
        for (path, weight, qparams), *others in readers.values():
            if qparams is None or any(q != qparams for *_, q in others):
                continue
            if not all(float(point).is_integer() for point in qparams.zero_points):
                continue  # conversion cuts these: another grid
            wanted = quantize(weight.data, qparams)
            apart = wanted.int() != quantize_native(weight.data, qparams)
            if count := int(apart.sum()):
                values = dequantize(wanted, qparams).to(weight.dtype)
                weight.data = torch.where(apart, values, weight.data)
                rewriter.note(f"{path}: {count} weights held in {qparams.range_text}")


def _readers(model: nn.Module) -> Iterator[tuple[str, Tensor, QParams | None]]:
    """(path, weight, how it is quantized; None for a reader that doesn't) of every parameter."""
    held: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        quantizer = getattr(module, "weight_fake_quant", None)
        if isinstance(quantizer, FrozenFakeQuantize) and batch_norm_factor(module) is None:
            inner = holder(module)
            held |= {f"{path}.{n}" for n, p in module.named_parameters() if p is inner.weight}
            yield f"{path}.weight", inner.weight, quantizer.qparams
    parameters = dict(model.named_parameters(remove_duplicate=False))
    constants = parameters | dict(model.named_buffers(remove_duplicate=False))
    nodes: Any = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    for node in nodes:
        if node.op == "get_attr" and str(node.target) in constants:
            held.add(str(node.target))
            for user in node.users:
                yield str(node.target), constants[str(node.target)], _quantized(user, model)
    for path, parameter in parameters.items():
        if path not in held:
            yield path, parameter, None


def _quantized(user: fx.Node, model: nn.Module) -> QParams | None:
    if user.op != "call_module":
        return None
    module = model.get_submodule(str(user.target))
    return module.qparams if isinstance(module, FrozenFakeQuantize) else None
