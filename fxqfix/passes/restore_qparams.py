"""restore-qparams: scales, zero points and weights of a converted model, taken from a right one.

The donor is the conversion of the frozen prepared model: what it holds at a site is what was
trained. State is copied from node to node; the structure of the user's graph stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from torch import fx, nn

from fxqfix import dialects
from fxqfix.errors import PassError
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._donation import Donation
from fxqfix.passes._state import holders

__all__ = ["RestoreQParams"]


@dataclass(frozen=True)
class RestoreQParams(Pass):
    """Give sites of a converted model the grids, codes and biases that a donor has there.

    Works on reference, int8 and decomposed models; the donor is of the same dialect.

    Attributes:
        donor: A conversion of the same model with the right state; it is not changed.
        sites: Name of a site -> name of the donor's site. A site and the weight of its op share a
            module in most dialects, and are restored together.

    Raises:
        UnsupportedError: A site's node and the donor's are of different kinds.

    Example:
        >>> import copy, torch
        >>> from torch.ao.quantization import get_default_qat_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
        >>> import fxqfix
        >>> from fxqfix.passes import RestoreQParams
        >>> x = torch.linspace(-1, 1, 16).reshape(2, 8)
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2)).train()
        >>> prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
        >>> _ = prepared(x)
        >>> donor = convert_fx(fxqfix.freeze(prepared))
        >>> converted = convert_fx(copy.deepcopy(prepared))
        >>> restored = RestoreQParams(donor, {"_0.weight": "_0.weight"})(converted).graph_module
        >>> torch.equal(restored(x), donor(x))
        True
    """

    name: ClassVar[str] = "restore-qparams"
    donor: fx.GraphModule | None = field(default=None, repr=False)
    sites: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    def rewrite(self, rewriter: Rewriter) -> None:
        """Copy site by site."""
        if self.donor is None or not self.sites:
            return
        mine = {t.site.name: t for t in dialects.read(rewriter.graph_module).taps}
        theirs = {t.site.name: t for t in dialects.read(self.donor).taps}
        done: set[fx.Node] = set()
        for name, other in self.sites.items():
            work = Donation(rewriter, self.donor, name)
            work.check(mine[name], theirs[other])
            for node, source in holders(mine[name], theirs[other]):
                if node not in done:
                    work.state(node, source)
                    done.add(node)
            work.repeat(mine[name])
        for node in reversed(list(rewriter.graph.nodes)):
            if node.op == "get_attr" and not node.users:
                rewriter.graph.erase_node(node)

    def ensures(self, after: nn.Module) -> None:
        """Every site has the donor's grid, every weight its codes."""
        if self.donor is None:
            return
        theirs = {t.site.name: t for t in dialects.read(self.donor).taps}
        found = {t.site.name: t for t in dialects.read(after).taps}
        for name, other in self.sites.items():
            if found[name].site.used != theirs[other].site.used:
                raise PassError(
                    "a site does not have the donor's qparams",
                    where=f"{self.name}, site {name!r}",
                    found=str(found[name].site.used),
                    expected=str(theirs[other].site.used),
                )
