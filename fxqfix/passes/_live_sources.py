"""Where the parameters of a deployed model's two graphs come from."""

from __future__ import annotations

import re
from typing import Any

from torch import fx, nn

from fxqfix.dialects import Reading, Tap
from fxqfix.dialects._constants import bias_node
from fxqfix.dialects._writes import IN_FLOAT
from fxqfix.dialects.weights import prepared_weight, weight_quantizer
from fxqfix.errors import UnsupportedError
from fxqfix.pairing import Pairing, pair
from fxqfix.passes._live import LiveOp, LiveWeight

__all__ = ["Sources", "attribute_of", "path_of"]

_COPIES = re.compile(rf"(_call_\d+|{IN_FLOAT})+$")  # what freeze appends to paths of modules


class Sources:
    """Where the parameters of a frozen model, and of its int8 form, come from.

    Args:
        prepared: The model that is trained: frozen, its BatchNorms not folded.
        frozen: The reading of what `freeze` made of it.
        converted: The reading of what `to_int8` made of it.
    """

    def __init__(self, prepared: nn.Module, frozen: Reading, converted: Reading) -> None:
        self.prepared, self.frozen, self.converted = prepared, frozen, converted
        self.pairing: Pairing = pair(frozen, converted)
        self.weights: dict[Tap, LiveWeight] = {}
        for tap in frozen.weights:
            if tap.site.used is not None:
                self.weights[tap] = self._weight(tap)

    def module(self, path: str) -> nn.Module | None:
        """The prepared module that stands behind a path of the frozen or the int8 model."""
        found: Any = attribute_of(self.prepared, path)
        if not isinstance(found, nn.Module):
            found = attribute_of(self.prepared, _COPIES.sub("", path))
        return found if isinstance(found, nn.Module) else None

    def _weight(self, tap: Tap) -> LiveWeight:
        used = tap.site.used
        assert used is not None  # asked by the caller
        if tap.quantizer is None:
            owner = self.module(str(tap.node.target))
            assert owner is not None  # the frozen model is a copy of the prepared one
            return LiveWeight(owner, used)
        source, bias = tap.producer, bias_node(tap.node)
        nodes = [source] if bias is None else [source, bias]
        if any(n.op != "get_attr" for n in nodes):
            raise UnsupportedError(
                "a weight that the graph computes can't be trained as it is deployed",
                where=f"site {tap.site.name!r}",
                found=", ".join(n.format_node() or n.name for n in nodes),
                remedy="make the weight, and the bias, a parameter that the op reads itself",
            )
        names = str(source.target), None if bias is None else str(bias.target)
        return LiveWeight(self.prepared, used, names)

    def parts(self, closed: nn.Module) -> dict[str, LiveWeight]:
        """The quantized weights inside a closed module, by path."""
        found = {}
        for path, module in closed.named_modules():
            known = prepared_weight(module, path, settled=False) if path else None
            if known is not None and known[0].used is not None:
                found[path] = LiveWeight(module, known[0].used)
        return found

    def live(self, tap: Tap) -> LiveOp | None:
        """The float op of a weight's tap; None for a function, which the graph itself spells."""
        if tap.quantizer is not None:
            return None
        return self.op(tap, self.frozen.graph_module.get_submodule(str(tap.node.target)))

    def op(self, tap: Tap, template: nn.Module) -> LiveOp:
        """A float op that runs on the parameters of a weight's tap."""
        live = self.weights[tap]
        quantizer: Any = getattr(live.owner, "weight_fake_quant", None)
        if tap.quantizer is not None:
            quantizer = self.module(path_of(tap.quantizer))
        if hasattr(template, "weight_fake_quant"):
            template.weight_fake_quant = nn.Identity()
        return LiveOp(template, live, quantizer or weight_quantizer(live.owner))


def path_of(node: fx.Node) -> str:
    """The path that a node calls or reads."""
    return str(node.target)


def attribute_of(model: nn.Module, path: str) -> Any:
    """What stands at a path of a model; None for nothing."""
    owner, _, name = path.rpartition(".")
    try:
        return getattr(model.get_submodule(owner), name, None)
    except AttributeError:
        return None
