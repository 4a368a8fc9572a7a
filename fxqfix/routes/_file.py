"""A .pt2 file: written from a decomposed graph, loaded back, checked, and deployed by a route."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix import _torch, dialects
from fxqfix._reasons import innermost
from fxqfix.dialects import Reading
from fxqfix.dialects._base import scope
from fxqfix.dialects.decomposed import clamp_bounds
from fxqfix.errors import RouteError
from fxqfix.measure import tensors_of
from fxqfix.passes import CutSites
from fxqfix.passes.cut_sites import float_ends, output_nodes
from fxqfix.routes._base import Deployed, Route
from fxqfix.routes.export import ROUTE as EXPORT
from fxqfix.routes.export import Dynamic, exported

__all__ = ["SavedFile"]


@dataclass
class SavedFile:
    """A file that is written when its route gets the first batch.

    Attributes:
        path: Where it is written.
        reading: The graph that it is written from.
        program: What was loaded from it; the graph itself until then.
        notes: What a reader has to know.
    """

    path: Path
    reading: Reading

    def __post_init__(self) -> None:
        self.program: fx.GraphModule = self.reading.graph_module
        self.notes: tuple[str, ...] = ()
        self._sites: tuple[str, ...] = ()
        self._sizes: list[tuple[int, ...]] | None = None

    def deployed_by(self, route: Route) -> Route:
        """A route that starts from the file, where it is given the graph."""

        def deploy(
            graph_module: fx.GraphModule, batch: tuple[Any, ...], dynamic: Dynamic
        ) -> Deployed:
            if graph_module is self.reading.graph_module:
                self._write(batch, dynamic)
                form = self._form(route, self.program, batch, dynamic)
            else:  # the graph cut at its sites
                form = self._form(route, self._parts(), batch, dynamic)
            return replace(form, notes=("what ran is the .pt2 file, loaded back", *form.notes))

        return replace(route, deploy=deploy)

    def _form(
        self, route: Route, program: fx.GraphModule, batch: tuple[Any, ...], dynamic: Dynamic
    ) -> Deployed:
        if route is not EXPORT:
            assert route.deploy is not None
            return route.deploy(program, batch, dynamic)

        def run(*inputs: Any) -> Sequence[Tensor]:
            return list(tensors_of([program(*inputs)]))

        return Deployed(run, state=program)

    def _parts(self) -> fx.GraphModule:
        """The file cut at its sites. Export drops what does nothing: outputs go by their place."""
        mine, theirs = output_nodes(self.reading.graph_module), output_nodes(self.program)
        ends = tuple(theirs[mine.index(node)].name for node in float_ends(self.reading))
        cut: fx.GraphModule = CutSites(self._sites, ends)(self.program).graph_module
        return cut

    def _write(self, batch: tuple[Any, ...], dynamic: Dynamic) -> None:
        sizes = [tuple(t.shape) for t in tensors_of(batch)]
        if self._sizes is not None:
            raise RouteError(
                "the file does not take this batch",
                where="migrate",
                found=f"inputs of shapes {sizes}",
                expected=f"{self._sizes}, as in the first batch",
                remedy="let dynamic_batch=True (--dynamic-batch) leave the first dimension open, "
                "or leave such batches out (drop_last of a DataLoader)",
            )
        self._sizes = sizes
        remedy = "see whether torch.export.export takes the float model"
        if dynamic:
            remedy += ", or leave dynamic_batch=True out: the model may know its batch size "
            remedy += "(a PT2E model does, but where its own export left it open)"
        with _named("torch.export can't take this graph", sizes, remedy):
            program = exported(self.reading.graph_module, batch, dynamic)
            _name_modules(program, self.reading)
        loaded: Any = None
        with _named("torch.export can't save, or load, the program", sizes), _torch.quiet():
            torch.export.save(program, self.path)
            loaded = torch.export.load(self.path)
        self._take(dialects.read(loaded, "migrate"))

    def _take(self, loaded: Reading) -> None:
        """Take the loaded program, if its sites and its weights are those of the graph."""
        opened = {str(n.target) for n in self.program.graph.nodes if n.op == "call_module"}
        taps = [t for t in loaded.taps if not _within(scope(t.node, loaded.graph_module), opened)]
        own = replace(loaded, taps=tuple(taps))
        _check_same(self.reading, own)
        inner = len(loaded.activations) - len(own.activations)
        if inner:
            inside = f"{inner} sites inside of modules that export opens"
            self.notes = (f"{inside} are in the file and in no row; no clamp holds their ranges",)
        self._sites = tuple(t.node.name for t in own.activations)
        self.program = loaded.graph_module


@contextlib.contextmanager
def _named(what: str, sizes: object, remedy: str | None = None) -> Iterator[None]:
    """Say in one line which step failed, whatever torch.export raises, and prints."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints the graph it can't take
            yield
    except Exception as error:
        raise RouteError(
            f"{what}: {innermost(error)}",
            where="migrate",
            found=f"inputs of shapes {sizes}",
            remedy=remedy,
        ) from error


def _name_modules(program: Any, mine: Reading) -> None:
    """Write the module of each site into the program, where torch.export has seen none.

    Integer weights are buffers of the graph, so that the calls of their modules are gone.
    """
    theirs = dialects.read(program, "migrate")
    if len(theirs.activations) != len(mine.activations):
        return
    opened = {str(n.target) for n in mine.graph_module.graph.nodes if n.op == "call_module"}
    nodes = {n.name: n for n in program.graph.nodes if n.op == "call_function"}
    paths = {t.site.name: t.site.module for t in mine.activations}
    both = zip(mine.activations, theirs.activations, strict=True)
    found = [(b.producer, a.site.module) for a, b in both]
    if len(theirs.weights) == len(mine.weights):
        names = [t.site.name.rpartition(".")[0] for t in mine.weights]
        found += [(b.node, paths.get(n, "")) for n, b in zip(names, theirs.weights, strict=True)]
    for old, path in found:
        node = nodes.get(old.name)
        if node is None or not path or _within(path, opened):
            continue
        stack = dict(node.meta.get("nn_module_stack") or {})
        if all(not entry[0] for entry in stack.values()):
            node.meta["nn_module_stack"] = {**stack, path: (path, "torch.nn.modules.module.Module")}


def _within(path: str, modules: set[str]) -> bool:
    return any(path == m or path.startswith(f"{m}.") for m in modules)


def _check_same(mine: Reading, theirs: Reading) -> None:
    """Grids, ranges, clamps and integer weights of the file are those of the graph."""
    both = mine, theirs
    grids = [
        [
            (t.site.used, t.held is not None, clamp_bounds(t.kernel.all_input_nodes[0]))
            for t in r.activations
        ]
        for r in both
    ]
    weights = [[t.weight() for t in r.weights if t.weight is not None] for r in both]
    same = len(weights[0]) == len(weights[1]) and all(
        a.qparams == b.qparams and a.codes.dtype == b.codes.dtype and torch.equal(a.codes, b.codes)
        for a, b in zip(*weights, strict=True)
    )
    if len(weights[0]) < len(weights[1]):  # torch.export tells constants that are computed
        raise RouteError(
            "a weight that the graph computes can't be followed through the file",
            where="migrate",
            found=f"{len(weights[1])} weights in the file, {len(weights[0])} in the graph",
            remedy="compute it before the model is prepared, so that it is a parameter; "
            "fxqfix.to_decomposed and fxqfix.certify take the model as it is",
        )
    if grids[0] != grids[1] or not same:
        raise RouteError(
            "the saved program is not the graph that was exported",
            where="migrate",
            found="other grids, ranges or clamps" if same else "other integer weights",
            remedy="please report it, with the model and the version of torch",
        )
