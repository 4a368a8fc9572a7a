"""Kernels between two sites: what runs there and is known to be wrong."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

from torch import fx

from fxqfix.engines import Call, Defect, find_defect

__all__ = ["wrong_before"]


def wrong_before(
    end: fx.Node, sites: Container[fx.Node], calls: Mapping[str, Call]
) -> Defect | None:
    """The row of a wrong kernel that runs between the sites before a node and this node.

    Args:
        end: What computes a site, or the value that a model returns.
        sites: The paired sites, where the walk upstream stops.
        calls: The int8 ops, by node name.
    """
    queue, seen = list(end.all_input_nodes), set[fx.Node]()
    while queue:
        node = queue.pop(0)
        if node in seen or node in sites:
            continue
        seen.add(node)
        queue.extend(node.all_input_nodes)
        call = calls.get(node.name)
        found = find_defect(replace(call, rereads=())) if call is not None else None
        if found is not None and found.present:
            return found
    return None
