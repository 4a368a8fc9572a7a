"""cut-sites: each site computed from given codes, so that a deployed form shows what it adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxqfix import dialects
from fxqfix.dialects import Reading
from fxqfix.errors import DialectError
from fxqfix.passes._base import Pass, Rewriter

__all__ = ["CutSites", "cut_points", "float_ends", "output_nodes"]


@dataclass(frozen=True)
class CutSites(Pass):
    """Let every reader of a quantized activation read given codes instead.

    The result takes the model's inputs and then the codes of `cut_points`, in order; it returns the
    codes that each site computes from those of the sites before it, and then `float_ends`: the
    outputs that are quantized no more. Handed to a deployment, it shows in one run what each
    op adds there, given the same inputs.

    Attributes:
        sites: Names of the quantize ops to cut at; None for all of them.
        ends: Names of the nodes to return in place of `float_ends`.

    Raises:
        DialectError: The graph has no decomposed ops.

    Example:
        >>> from fxqfix.passes import CutSites
        >>> CutSites().name
        'cut-sites'
    """

    name: ClassVar[str] = "cut-sites"
    requires: ClassVar[tuple[str, ...]] = (
        "decompose-quantize",
        "pin-ranges",
    )
    sites: tuple[str, ...] | None = None
    ends: tuple[str, ...] | None = None

    def rewrite(self, rewriter: Rewriter) -> None:
        """Put a placeholder behind every quantize op; return what they give."""
        reading = dialects.read(rewriter.graph_module)
        if not reading.carries_ranges:
            raise DialectError(
                "only decomposed graphs are cut",
                where=self.name,
                found=f"a model of dialect {reading.dialect}",
                remedy="call fxqfix.to_decomposed(model) first",
            )
        graph = rewriter.graph
        nodes = {node.name: node for node in graph.nodes}
        sites, ends = cut_points(reading), float_ends(reading)
        if self.sites is not None:
            sites = tuple(nodes[name] for name in self.sites)
        if self.ends is not None:
            ends = tuple(nodes[name] for name in self.ends)
        anchor = _behind_inputs(graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                node.args = ()  # no default may stand before the codes, which have none
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


def _behind_inputs(graph: fx.Graph) -> fx.Node:
    """The node behind the inputs, which may stand where they are first used: all go to the top."""
    for node in reversed([n for n in graph.nodes if n.op == "placeholder"]):
        first = next(iter(graph.nodes))
        if node is not first:
            first.prepend(node)
    behind: fx.Node = next(n for n in graph.nodes if n.op != "placeholder")
    return behind


def cut_points(reading: Reading) -> tuple[fx.Node, ...]:
    """The quantize ops of a decomposed graph's activations, in graph order.

    Args:
        reading: Its reading.
    """
    return tuple(tap.node for tap in reading.activations if tap.site.used is not None)


def output_nodes(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose values a graph returns, in order.

    Args:
        graph_module: The graph.
    """
    output = next(n for n in graph_module.graph.nodes if n.op == "output")
    found: list[fx.Node] = []
    fx.map_arg(output.args, found.append)
    return found


def float_ends(reading: Reading) -> tuple[fx.Node, ...]:
    """The graph's outputs that are computed in float, and are no site's values.

    Args:
        reading: The decomposed graph's reading.
    """
    sites = {node for point in cut_points(reading) for node in (point, *point.users)}
    output = next(n for n in reading.graph_module.graph.nodes if n.op == "output")
    return tuple(n for n in output.all_input_nodes if n not in sites and n.op != "placeholder")
