"""Pair the sites of a prepared model with those of its conversion: by name, then by dataflow.

convert_pt2e records which observer a quantize op was made from; that comes before both. Names
survive conversion for most nodes. What fusion and lowering rename (add + relu -> add_relu), and
what a user edited, is found by dataflow: a converted site whose upstream sites are all paired is
the partner of the prepared site with the same upstream sites. What is left has a reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor, fx

from fxqfix.dialects import Reading, Tap, parents
from fxqfix.dialects._base import modules_of
from fxqfix.dialects._writes import overwrites, twins
from fxqfix.dialects.quantizer import LEAVES_FLOAT
from fxqfix.errors import PairingError
from fxqfix.qparams import QParams, dequantize

__all__ = ["Pair", "Pairing", "pair"]

# Cosine of a weight and its partner: 2-bit codes keep 0.9, unrelated weights have about 0.
_ALIKE = 0.5
_MANY = 2**20  # elements of a weight that tell so


@dataclass(frozen=True)
class Pair:
    """A prepared site and its converted partner, and how they were paired."""

    prepared: Tap
    converted: Tap
    how: str


@dataclass(frozen=True)
class Pairing:
    """All pairs in the prepared model's graph order, and what has no partner and why.

    Attributes:
        pairs: The pairs.
        unpaired: (tap, "prepared" or "converted", reason).
    """

    pairs: tuple[Pair, ...]
    unpaired: tuple[tuple[Tap, str, str], ...]


def pair(prepared: Reading, converted: Reading, *, checked: bool = False) -> Pairing:
    """Pair two readings.

    Args:
        prepared: The reading of the prepared model.
        converted: The reading of the converted model, of any dialect.
        checked: Whether it is known that they belong together.

    Returns:
        The pairs and the rest.

    Raises:
        PairingError: The models don't belong together: no site has a partner, or weights that
            should be the same have other shapes or nothing in common.
    """
    found = _by_origin(prepared.activations, converted.activations)
    # Conversion gives lowered functions new names, which may be those of other prepared ops.
    own = tuple(t for t in converted.activations if not _is_lowered(t.kernel))
    _by_name(prepared.activations, own, found)
    _by_dataflow(prepared, converted, found)
    _by_name(prepared.activations, converted.activations, found)
    _by_dataflow(prepared, converted, found)
    pairs = [Pair(p, c, how) for p, (c, how) in found.items()]
    pairs += _weights(prepared, converted, {p: c for p, (c, _) in found.items()})
    order = {tap: i for i, tap in enumerate(prepared.taps)}
    pairs.sort(key=lambda x: order[x.prepared])
    if not checked:
        _check(prepared, converted, pairs)
    return Pairing(tuple(pairs), tuple(_unpaired(prepared, converted, pairs)))


_Found = dict[Tap, tuple[Tap, str]]


def _base(tap: Tap) -> str:
    return tap.site.op.removesuffix("_relu")


def _alike(a: Tap, b: Tap) -> bool:
    """Same op, as far as both graphs still tell."""
    return _base(a) == _base(b) or "input" in (_base(a), _base(b))


def _by_origin(prepared: tuple[Tap, ...], converted: tuple[Tap, ...]) -> _Found:
    """By the quantizer's node that the conversion says it replaced."""
    made_from = {name: tap for tap in reversed(converted) for name in tap.origins}
    return {
        tap: (other, "origin")
        for tap in prepared
        for name in tap.origins
        if (other := made_from.get(name)) is not None
    }


def _takes_number(node: fx.Node) -> bool:
    """Whether a node adds a number to one value of the graph, or multiplies by one."""
    names = ("add", "mul", "sub", "iadd", "imul", "isub")
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    numbers = [a for a in node.args[:2] if isinstance(a, int | float)]
    known = name.removesuffix("_relu").removesuffix("_scalar").strip("_") in names
    return node.op != "call_module" and known and bool(numbers) and len(node.all_input_nodes) == 1


def _numbered(tap: Tap) -> bool:
    """The same of a site; a prepared graph has the relu behind the op, an int8 kernel inside."""
    node, ups = tap.producer, tap.producer.all_input_nodes
    fused = tap.site.op.endswith("_relu") and len(ups) == 1
    return _takes_number(node) or (fused and _takes_number(ups[0]))


def _is_lowered(node: fx.Node) -> bool:
    """Whether a node calls a kernel that conversion put in an operator's place, newly named."""
    kernels = "quantized.add", "quantized.mul", "quantized.matmul"
    return node.op == "call_function" and str(node.target).startswith(kernels)


def _by_name(prepared: tuple[Tap, ...], converted: tuple[Tap, ...], found: _Found) -> None:
    taken = {c for c, _ in found.values()}
    by_name = {_own_name(tap): tap for tap in converted if tap not in taken}
    for tap in prepared:
        other = by_name.get(tap.site.name)
        if tap not in found and other is not None and _alike(tap, other):
            found[tap] = (other, "name")


def _own_name(tap: Tap) -> str:
    """The name of a site before an eager module became a float island."""
    island = tap.site.module.endswith(".island")
    return tap.site.name.removesuffix("_island") if island else tap.site.name


def _by_dataflow(prepared: Reading, converted: Reading, found: _Found) -> None:
    """Grow the pairs downstream until nothing more can be paired."""
    mine = {tap.node: tap for tap in prepared.activations}
    ways: tuple[_Swaps, ...] = ({}, *_around_writes(prepared, mine))
    ups = {
        tap: {_upstream(tap, mine, swaps) for swaps in ways}
        for tap in prepared.activations
        if tap not in found
    }
    matched = {c for c, _ in found.values()}
    # A converted value that merely keeps its input's qparams is a site only if it was paired.
    # So does what adds or multiplies by a number: where training observes that, it is a site.
    scalar = any(map(_numbered, prepared.activations))
    theirs = {
        t.node: t
        for t in converted.activations
        if t in matched or not t.inherited or (scalar and _takes_number(t.kernel))
    }
    kept = [t for t in converted.activations if t not in theirs.values()]

    def fits(tap: Tap) -> bool:
        mine = () if tap in matched else _fitting(tap, ups, _upstream(tap, theirs), found)
        if len(mine) == 1:
            found[mine[0]] = (tap, "dataflow")
        return len(mine) == 1

    while len(found) < len(prepared.activations):
        grown = [tap for tap in theirs.values() if fits(tap)]
        if not grown:
            # The first of these in graph order is the nearest to what is paired already.
            grown = list(itertools.islice(filter(fits, kept), 1))
            theirs |= {tap.node: tap for tap in grown}
        if not grown:
            return
        matched.update(grown)


def _fitting(
    tap: Tap, ups: Mapping[Tap, set[frozenset[Tap]]], wanted: frozenset[Tap], found: _Found
) -> tuple[Tap, ...]:
    """The prepared sites that are fed as a converted one is; with a number only if it is too."""
    fits = [
        p
        for p, ways in ups.items()
        if p not in found
        and _alike(p, tap)
        and (not tap.inherited or _base(p) == _base(tap))
        and any(up <= found.keys() and {found[u][0] for u in up} == wanted for up in ways)
    ]
    number = _numbered(tap)
    alike = [p for p in fits if _numbered(p) == number]
    return tuple(alike or fits)


_Swaps = Mapping[tuple[fx.Node, fx.Node], fx.Node]


def _upstream(
    tap: Tap, taps: Mapping[fx.Node, Tap], swaps: _Swaps = MappingProxyType({})
) -> frozenset[Tap]:
    return frozenset(parents(tap.node.all_input_nodes, taps, swaps))


def _around_writes(prepared: Reading, taps: Mapping[fx.Node, Tap]) -> tuple[_Swaps, _Swaps]:
    """Where an op reads what another overwrote, what else a converted one may read by name.

    The value from before the write, and the site of the op that wrote.
    """
    sites = {tap.producer: node for node, tap in taps.items()}
    graph, modules = prepared.graph_module.graph, modules_of(prepared.graph_module)
    reads = [(use.value, use) for use in overwrites(graph, modules)] + twins(graph, modules)
    before = {(use.reader, read): use.value for read, use in reads}
    behind = {(use.reader, read): sites.get(use.op, use.op) for read, use in reads}
    return before, behind


def _weights(prepared: Reading, converted: Reading, partner: Mapping[Tap, Tap]) -> list[Pair]:
    """Pair weights by name, the rest by the site that they feed."""
    origins = _by_origin(prepared.weights, converted.weights)
    found = {tap: Pair(tap, other, how) for tap, (other, how) in origins.items()}
    taken = {x.converted for x in found.values()}
    by_name = {tap.site.name: tap for tap in converted.weights if tap not in taken}
    found |= {
        tap: Pair(tap, by_name[tap.site.name], "name")
        for tap in prepared.weights
        if tap not in found and tap.site.name in by_name
    }
    used = {x.converted for x in found.values()}
    theirs = {t: _fed(t, partner.values()) for t in converted.weights if t not in used}
    for tap in (t for t in prepared.weights if t not in found):
        fed = {partner[owner] for owner in _fed(tap, partner)}
        fits = [t for t, sites in theirs.items() if fed & sites and _alike(tap, t)]
        # Several that feed one site come in the order of the graph.
        fits.sort(key=lambda x: (theirs[x] != fed, x.site.shape != tap.site.shape))
        if fits:
            found[tap] = Pair(tap, fits[0], "dataflow")
            del theirs[fits[0]]
    return list(found.values())


def _fed(weight: Tap, paired: Iterable[Tap]) -> set[Tap]:
    """The nearest paired activation sites downstream of the op that uses a weight."""
    taps = {tap.node: tap for tap in paired}
    queue, seen, found = [weight.node], set[fx.Node](), set[Tap]()
    while queue:
        node = queue.pop(0)
        if node in taps:
            found.add(taps[node])
        elif node not in seen:
            seen.add(node)
            queue.extend(node.users)
    return found


def _unpaired(
    prepared: Reading, converted: Reading, pairs: list[Pair]
) -> list[tuple[Tap, str, str]]:
    done = {p.prepared for p in pairs} | {p.converted for p in pairs}
    names = {n.name for n in converted.graph_module.graph.nodes}
    left: list[tuple[Tap, str, str]] = []
    for tap in (t for t in prepared.taps if t not in done):
        if tap.site.used is None and tap.site.source.startswith(LEAVES_FLOAT):
            continue  # embedding indices, masks: no site
        reason = "no site of the converted model has its name or its inputs"
        if tap.site.used is None:
            reason = f"not quantized to integers: {tap.site.source}"
        elif tap.producer.name in names:
            reason = f"node {tap.producer.name!r} of the converted model is not quantized"
        left.append((tap, "prepared", reason))
    for tap in (t for t in converted.taps if t not in done and not t.inherited):
        reason = "no site of the prepared model has its name or its inputs"
        left.append((tap, "converted", reason))
    return left


def _check(prepared: Reading, converted: Reading, pairs: list[Pair]) -> None:
    kinds = [p.prepared.site.kind for p in pairs]
    # Inputs pair with each other in any two models; weights only where the models belong together.
    shapes = [sorted(str(t.site.shape) for t in r.weights) for r in (prepared, converted)]
    strangers = all(shapes) and shapes[0] != shapes[1] and "weight" not in kinds
    # Where weights alone are quantized, or with dynamic activations, the weights are what pairs.
    static = any(t.site.used is not None for t in prepared.activations)
    due = "activation" if static else "weight"
    known = any(t.site.used is not None for t in prepared.taps)
    if strangers or (known and "activation" not in kinds and due not in kinds):
        raise PairingError(
            "the two models have next to no site in common",
            where="compare",
            found=f"prepared sites {[t.site.name for t in prepared.activations][:5]}, "
            f"converted sites {[t.site.name for t in converted.activations][:5]}",
            remedy="pass the prepared model and what was converted from it",
        )
    for p in pairs:
        mine, theirs = p.prepared.site.shape, p.converted.site.shape
        if mine is not None and theirs is not None and mine != theirs:
            raise PairingError(
                "the converted model is not a conversion of the prepared one: weight shapes differ",
                where=f"compare, site {p.prepared.site.name!r}",
                found=f"converted {theirs}",
                expected=f"prepared {mine}",
                remedy="pass the prepared model and what was converted from it",
            )
    weights = [p for p in pairs if p.prepared.site.kind == "weight"]
    if weights and not any(map(_related, weights)):
        raise PairingError(
            "the converted model is not a conversion of the prepared one: it has other weights",
            where="compare",
            found=f"none of {[p.converted.site.name for p in weights][:5]} is like its partner",
            expected="the prepared weights, quantized",
            remedy="pass the prepared model and what was converted from it; these may be two "
            "checkpoints",
        )


def _related(p: Pair) -> bool:
    """Whether two weights may well be one, quantized twice; True where that can't be told."""
    if p.prepared.weight is None or p.converted.weight is None:
        return True
    views = p.prepared.weight(), p.converted.weight()
    if any(view.garbled for view in views):
        return True
    if views[0].codes.numel() != views[1].codes.numel():
        return True
    mine, theirs = (_some(v.codes, v.qparams).double().flatten() for v in views)
    theirs = theirs.to(mine.device)
    norm = float(mine.norm() * theirs.norm())
    if mine.numel() != theirs.numel() or norm == 0.0:
        return True
    return float(mine @ theirs) / norm > _ALIKE


def _some(codes: Tensor, grid: QParams) -> Tensor:
    """Values of a weight: of every so manieth row, where there are many."""
    step = max(codes.numel() // _MANY, 1)
    if step == 1 or grid.axis not in (None, 0) or codes.shape[0] < step:
        return dequantize(codes, grid)
    if grid.axis == 0:
        grid = replace(grid, scale=grid.scales[::step], zero_point=grid.zero_points[::step])
    return dequantize(codes[::step], grid)
