"""certify: a deployed form beside the decomposed graph, on the same data, site by site."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import _rng, _torch, dialects
from fxqfix._devices import CPU, device_of
from fxqfix._reasons import innermost
from fxqfix._settings import as_given, entry, read_as_given
from fxqfix.dialects import CODE, Reading, Tap
from fxqfix.dialects._finite import refuse_non_finite
from fxqfix.dialects.decomposed import is_dequantize, is_pinned
from fxqfix.errors import FxqfixError, RouteError, UnsupportedError
from fxqfix.flows import to_decomposed
from fxqfix.measure import (
    Discrepancy,
    Run,
    State,
    batches_of,
    cannot_run,
    discrepancy,
    float_discrepancy,
    held,
    positional,
    streamed,
    tensors_of,
)
from fxqfix.passes import CutSites, Pass, chain
from fxqfix.passes.cut_sites import cut_points, float_ends, output_nodes
from fxqfix.qparams import QParams
from fxqfix.report import Certificate, Certified
from fxqfix.routes import _registry
from fxqfix.routes._base import Deployed, Route, SiteView, output_discrepancy, unlike
from fxqfix.routes._explain import explain, float_error
from fxqfix.routes._identity import Digest, identity
from fxqfix.routes._own import Deployer
from fxqfix.routes._seen import Seen
from fxqfix.routes.export import Axes, Dynamic, fixed_sizes, open_axes

__all__ = ["Watched", "certify", "with_code"]


@entry
def certify(
    model: nn.Module,
    route: str | Deployer | Route,
    data: Iterable[Any],
    *,
    dynamic_batch: bool = False,
    dynamic_shapes: Axes | None = None,
    opset: int | None = None,
    progress: bool | None = None,
) -> Certificate:
    """Run a model as a route deploys it beside its decomposed graph, on the same data.

    The whole model is deployed, and its outputs are compared. Then it is deployed once more cut at
    its sites (pass `cut-sites`): each op gets the decomposed graph's own codes, so that what it
    gives is what this route adds there. Buffers that a run writes are put back behind it.

    Args:
        model: Prepared (it is frozen, decomposed and its ranges are pinned on the way), decomposed
            (it is deployed as it is, pinned or not), or an exported program of one. The routes
            "int8:ENGINE" take a prepared one. It is not changed.
        route: Its name (`fxqfix routes` lists them), or your own: see `fxqfix.routes.Deployer`.
        data: Any iterable of batches, as in `compare`; read once, never stored.
        dynamic_batch: Whether it takes any size of the first dimension; else it is deployed anew.
        dynamic_shapes: In its place, the axes of any size as torch.export has them, per input.
        opset: Of the ONNX routes; None is the exporter's own, or the lowest that the graph needs.
        progress: Show a bar (needs tqdm); None shows it on a terminal only.

    Returns:
        The certificate: codes that differ, codes out of range, kernels, causes.

    Raises:
        UnknownNameError, MissingDependencyError: There is no such route, or a package of it.
        RouteError: The route can't lower, load or run the graph.
        DialectError, TraceError, RangeUnknownError: The model can't be decomposed.
        DataError, NonFiniteError, DeviceError, ModelRunError, OptionError, UnsupportedError: The
            data, or an option, can't be used; the model returns no tensors.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import get_default_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import prepare_fx
        >>> x = torch.linspace(-1, 1, 8).reshape(1, 8)
        >>> mapping = get_default_qconfig_mapping("fbgemm")
        >>> prepared = prepare_fx(torch.nn.Sequential(torch.nn.Linear(8, 2)).eval(), mapping, (x,))
        >>> _ = prepared(x)
        >>> certificate = certify(prepared, "export", [x, 3 * x])
        >>> certificate.exact, certificate.out_of_range
        (True, 0)
    """
    found = _registry.with_opset(_registry.find(route), opset)
    refuse_non_finite(model, f"certify, route {found.name}")
    if found.certify is not None:
        return found.certify(model, data, progress)
    with torch.no_grad(), _rng.same_rng():
        where = f"certify, route {found.name}"
        own = dialects.read(model, "certify")
        reading = _decomposed(own, found.passes)
        watched = Watched(found, reading, open_axes(reading, dynamic_shapes, dynamic_batch), where)
        deque(watched.stream(data if found.anywhere else watched.on_cpu(data), progress), 0)
        return watched.certificate()


def _decomposed(own: Reading, passes: Sequence[Pass]) -> Reading:
    """The decomposed graph: a new module; the passes are run on what was not decomposed before."""
    graph_module = to_decomposed(own.graph_module, pin_ranges=False)
    if not own.carries_ranges and passes:
        graph_module = chain(graph_module, *passes).graph_module
    return with_code(dialects.read(graph_module), own)


def with_code(reading: Reading, own: Reading) -> Reading:
    """A reading with the hooks of the model that its graph was made from, which it has no more.

    Args:
        reading: Of the decomposed graph.
        own: Of the user's model.
    """
    lost = tuple(found for found in own.unsupported if found[0].source == CODE)
    return replace(reading, unsupported=(*reading.unsupported, *lost))


@dataclass
class Watched:
    """One certification in progress; between batches it keeps numbers and deployed forms only.

    Attributes:
        route: How the graph is deployed.
        reading: The decomposed graph.
        dynamic: Whether the deployed form takes any size of the inputs' first dimension, or the
            axes that it takes any size of, per input.
        where: Who asks, for messages.
    """

    route: Route
    reading: Reading
    dynamic: Dynamic
    where: str
    result: Run = field(default_factory=Run)
    forms: dict[Any, tuple[Deployed, Deployed | None]] = field(default_factory=dict)
    sums: dict[str, Discrepancy] = field(default_factory=dict)
    causes: dict[str, Counter[str]] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)
    digest: Digest = field(default_factory=Digest)

    def __post_init__(self) -> None:
        self.graph_module = self.reading.graph_module
        self.cut: fx.GraphModule = CutSites()(self.graph_module).graph_module
        self.states = [State(self.graph_module), State(self.cut)]
        self.sites = [t for t in self.reading.activations if t.site.used is not None]
        self.ends = float_ends(self.reading)
        for site, reason in self.reading.unsupported:
            self.unchecked[site.name] = reason

    def on_cpu(self, data: Iterable[Any]) -> Iterable[Any]:
        """Go to the CPU, where this route runs.

        Returns:
            The batches, on the CPU.
        """
        home = device_of(self.graph_module)
        if home == CPU:
            return data
        self.graph_module.cpu()
        self.cut.cpu()
        self.notes[f"deployed from a copy on the CPU: the model is on {home}"] = None
        batches = read_as_given(batches_of(data, self.where))
        return (_torch.tree_map_tensors(Tensor.cpu, batch) for batch in batches)

    # ------------------------------------------------------------------ one batch

    def stream(self, data: Iterable[Any], progress: bool | None) -> Iterator[tuple[Any, ...]]:
        """Read the data once; yields the graph's arguments of each batch, when it was watched.

        Args:
            data: Any iterable of batches.
            progress: Whether to show a bar.
        """
        options: Any = {"where": self.where, "progress": progress}
        for args, kwargs in streamed(self.graph_module, data, self.result, **options):
            inputs = positional(self.graph_module, args, kwargs, self._here)
            self._batch(inputs)
            self.digest.add(inputs)
            yield inputs

    def _batch(self, args: tuple[Any, ...]) -> None:
        """Run one batch through the decomposed graph and both deployed forms."""
        seen = Seen(self.graph_module, self.reading)
        wanted = self._wanted(seen, args)
        flat = self._inputs(args)
        codes = [seen.values[node] for node in cut_points(self.reading)]
        whole, parts = self._deployed(args, (*flat, *codes))
        found = self._run(whole, args, wanted)
        for index, (node, a, b) in enumerate(
            zip(output_nodes(self.graph_module), wanted, found, strict=True)
        ):
            self._add(f"output {index}", self._output(node, a, b))
        inner = [*codes, *(seen.values[node] for node in self.ends)]
        given = self._inside(parts, (*flat, *codes), inner)
        if given is None:
            return
        for tap, value in zip(self.sites, given, strict=False):
            self._site(tap, seen, value)
        for node, value in zip(self.ends, given[len(self.sites) :], strict=True):
            self._end(node, seen, value)

    def _inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """One value per input of the cut graph, which has no defaults and packs nothing."""
        nodes = [n for n in self.graph_module.graph.nodes if n.op == "placeholder"]
        flat = tuple(tensors_of(args))
        defaults = (n.args[0] for n in nodes[len(args) :] if n.args)
        return flat if len(flat) == len(nodes) else (*args, *defaults)

    @property
    def _here(self) -> str:
        return f"{self.where}, batch {self.result.batches}"

    def _wanted(self, seen: Seen, args: tuple[Any, ...]) -> list[Tensor]:
        try:
            with (
                self.states[0].held(),
                _rng.same_rng(),
                as_given(model=True),
            ):  # what draws random numbers draws the same in every form
                wanted = list(tensors_of([seen.run(*_copied(args))]))
        except Exception as error:  # a graph can raise anything
            raise cannot_run("the model", error, self._here, args) from error
        nodes = output_nodes(self.graph_module)
        other = [n for n in nodes if not isinstance(seen.values[n], Tensor)]
        if other:  # forms and rows go by the places of the outputs
            raise UnsupportedError(
                "the model returns what is no tensor",
                where=self.where,
                found=", ".join(f"{n.name}, a {type(seen.values[n]).__name__}" for n in other),
                remedy="return tensors only: the parts of a chunk or split one by one, no sizes",
            )
        return wanted

    def _inside(
        self, parts: Deployed | None, args: tuple[Any, ...], wanted: Sequence[Tensor]
    ) -> Sequence[Tensor] | None:
        """What the cut graph gives; None where it can't be deployed or run."""
        try:
            return None if parts is None else self._run(parts, args, wanted)
        except RouteError as error:
            self.unchecked["all sites"] = f"the route can't take the cut graph: {error}"
            return None

    def _deployed(
        self, whole: tuple[Any, ...], parts: tuple[Any, ...]
    ) -> tuple[Deployed, Deployed | None]:
        key = repr(fixed_sizes(whole, self.dynamic))
        if key in self.forms:
            return self.forms[key]
        if self.forms:
            self.notes["batches of several sizes: each was deployed anew"] = None
        deployed = self._deploy(self.graph_module, whole)
        inside: Deployed | None = None
        try:
            inside = self._deploy(self.cut, parts)
        except RouteError as error:
            self.unchecked["all sites"] = f"the route can't take the cut graph: {error}"
        self.forms[key] = deployed, inside
        self.notes |= dict.fromkeys(deployed.notes)
        return self.forms[key]

    def _deploy(self, graph_module: fx.GraphModule, batch: tuple[Any, ...]) -> Deployed:
        assert self.route.deploy is not None
        try:
            with held(self.states):
                form = self.route.deploy(graph_module, _copied(batch), self.dynamic)
            return replace(form, state=form.state and State(form.state))
        except FxqfixError:
            raise
        except Exception as error:  # exporters and compilers raise anything
            raise self._failed("lower this graph", error, batch) from error

    def _run(
        self, form: Deployed, args: tuple[Any, ...], wanted: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        try:
            with held([*self.states, form.state]), _rng.same_rng(), as_given(model=True):
                found = list(form.run(*_copied(args)))
        except FxqfixError:
            raise
        except Exception as error:
            raise self._failed("run this batch", error, args) from error
        if wrong := unlike(wanted, found):
            raise self._failed("give what the graph gives", ValueError(wrong), args)
        return found

    def _failed(self, what: str, error: Exception, batch: tuple[Any, ...]) -> RouteError:
        return RouteError(
            f"the route can't {what}: {innermost(error)}",
            where=self.where,
            found=f"inputs of shapes {[tuple(t.shape) for t in tensors_of(batch)]}",
            remedy="see whether the route takes the model as it is without fxqfix; "
            "fxqfix.certify(model, 'export', data) tells whether the graph itself can be exported",
        )

    # ------------------------------------------------------------------ what is compared

    def _site(self, tap: Tap, seen: Seen, found: Tensor) -> None:
        grid = tap.site.used
        assert grid is not None
        wanted, value = seen.values[tap.node], seen.values[tap.producer]
        self._add(tap.site.name, discrepancy(wanted, found, grid, grid))
        view = SiteView(self.reading, tap, grid, seen.values, value, wanted, found)
        counts, problem = explain(view, self.route.arithmetic, self.route.lapses)
        self.causes.setdefault(tap.site.name, Counter()).update(counts)
        if problem:
            self.unchecked[f"{tap.site.name}: rounding"] = problem

    def _end(self, node: fx.Node, seen: Seen, found: Tensor) -> None:
        wanted = seen.values[node]
        self._add(node.name, float_discrepancy(wanted, found))
        differs = wanted != found
        if not bool(differs.any()):
            return
        exact, width, problem = float_error(self.graph_module, seen.values, node, wanted)
        near = (found.double() - exact).abs() <= width
        counts = {
            "rounding": int((differs & near).sum()),
            "unexplained": int((differs & ~near).sum()),
        }
        self.causes.setdefault(node.name, Counter()).update({k: n for k, n in counts.items() if n})
        if problem:
            self.unchecked[f"{node.name}: rounding"] = problem

    def _output(self, node: fx.Node, wanted: Tensor, found: Tensor) -> Discrepancy:
        grid = self._grid(node)
        if grid is None:
            return float_discrepancy(wanted, found)
        return output_discrepancy(wanted, found, grid)

    def _grid(self, node: fx.Node) -> QParams | None:
        """The grid of an output that shows a site's value."""
        source = node.all_input_nodes[0] if is_dequantize(node) else None
        return next((t.site.used for t in self.sites if t.node is source), None)

    def _add(self, name: str, found: Discrepancy) -> None:
        self.sums[name] = self.sums.get(name, Discrepancy()) + found

    # ------------------------------------------------------------------ the result

    def certificate(self) -> Certificate:
        """What was seen over all batches."""
        names = ("torch", *self.route.packages)
        narrow = [t for t in self.sites if t.site.used is not None and t.site.used.is_narrow]
        pinned = sum(is_pinned(t, self.reading) for t in narrow)
        outputs = output_nodes(self.graph_module)
        kernels: tuple[tuple[str, int], ...] = next(iter(self.forms.values()))[0].kernels
        return Certificate(
            route=self.route.name,
            versions={name: metadata.version(name) for name in names},
            batches=self.result.batches,
            sites=tuple(self._certified()),
            outputs=tuple(self._shown(f"output {i}", node) for i, node in enumerate(outputs)),
            narrow=len(narrow),
            pinned=pinned,
            kernels=kernels,
            notes=(*self.result.notes, *self.notes, *self.states[0].notes),
            unchecked=tuple(self.unchecked.items()),
            identity=identity(self.digest),
        )

    def _shown(self, name: str, node: fx.Node) -> Certified:
        """The record of an output, with the name of the one that has it on the same inputs."""
        source = node.all_input_nodes[0] if is_dequantize(node) else node
        site = next((t.site.name for t in self.sites if t.node is source), "")
        shown_by = node.name if node in self.ends else site
        return Certified(name, "", self._grid(node), self.sums[name], shown_by=shown_by)

    def _certified(self) -> Iterator[Certified]:
        rows = [(t.site.name, t.site.op, t.site.used) for t in self.sites]
        ends = [(node.name, "", None) for node in self.ends]
        for name, op, grid in (*rows, *ends):
            if name in self.sums:
                yield Certified(name, op, grid, self.sums[name], dict(self.causes.get(name, {})))


def _copied(values: tuple[Any, ...]) -> Any:
    return _torch.tree_map_tensors(Tensor.clone, values)
