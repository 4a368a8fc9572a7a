"""cut-sites: each site computed from given codes, so that a deployed form shows what it adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxqfix import dialects
from fxqfix.dialects import Reading
from fxqfix.dialects.decomposed import NAME
from fxqfix.errors import DialectError
from fxqfix.passes._base import Pass, Rewriter

__all__ = ["CutSites", "cut_points", "float_ends"]


@dataclass(frozen=True)
class CutSites(Pass):
    """Let every reader of a quantized activation read given codes instead.

    The result takes the model's inputs and then the codes of `cut_points`, in order; it returns the
    codes that each site computes from those of the sites before it, and then `float_ends`: the
    outputs that are quantized no more. Handed to a deployment, it shows in one run what each
    op adds there, given the same inputs.

    Raises:
        DialectError: The graph has no decomposed ops.

    Example:
        >>> from fxqfix.passes import CutSites
        >>> CutSites().name
        'cut-sites'
    """

    name: ClassVar[str] = "cut-sites"

    def rewrite(self, rewriter: Rewriter) -> None:
        """Put a placeholder behind every quantize op; return what they give."""
        reading = dialects.read(rewriter.graph_module)
        if reading.dialect != NAME:
            raise DialectError(
                "only decomposed graphs are cut",
                where=self.name,
                found=f"a model of dialect {reading.dialect}",
                remedy="call fxqfix.to_decomposed(model) first",
            )
        ends = float_ends(reading)
        sites = cut_points(reading)
        graph = rewriter.graph
        anchor = next(iter(graph.nodes))
        for node in [n for n in graph.nodes if n.op == "placeholder"]:  # ahead of what is given
            if node is anchor:
                anchor = node.next
            else:
                anchor.prepend(node)
        for node in sites:
            with graph.inserting_before(anchor):
                given = graph.create_node("placeholder", f"{node.name}_codes")
            node.replace_all_uses_with(given)
            rewriter.note(f"{node.name}: read from an input")
        output = next(n for n in graph.nodes if n.op == "output")
        output.args = ((*sites, *ends),)
        # An exported graph packs its inputs and outputs as its model had them.
        graph.set_codegen(fx.graph.CodeGen())
        graph.eliminate_dead_code()


def cut_points(reading: Reading) -> tuple[fx.Node, ...]:
    """The quantize ops of a decomposed graph's activations, in graph order.

    Args:
        reading: Its reading.
    """
    return tuple(tap.node for tap in reading.activations if tap.site.used is not None)


def float_ends(reading: Reading) -> tuple[fx.Node, ...]:
    """The graph's outputs that are computed in float, and are no site's values.

    Args:
        reading: The decomposed graph's reading.
    """
    sites = {node for point in cut_points(reading) for node in (point, *point.users)}
    output = next(n for n in reading.graph_module.graph.nodes if n.op == "output")
    return tuple(n for n in output.all_input_nodes if n not in sites and n.op != "placeholder")
