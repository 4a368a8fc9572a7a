"""What quantization itself costs: the float model beside the frozen prepared one, site by site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import _rng, _torch
from fxqfix._settings import as_given
from fxqfix.comparison.float_model import float_model_of, in_float
from fxqfix.comparison.plan import Plan
from fxqfix.dialects import trace
from fxqfix.dialects._base import modules_of
from fxqfix.errors import FxqfixError, PairingError
from fxqfix.measure import Discrepancy, cannot_run, decibels, positional, tensors_of
from fxqfix.passes._ends import returned
from fxqfix.passes._shadow_modules import Clone
from fxqfix.qparams import QParams, quantize
from fxqfix.report import Row

__all__ = ["FloatBeside"]

_WHERE = "compare, float_model"


class FloatBeside:
    """Runs the float model and the frozen prepared one on each batch, and compares every site.

    Both run in eval mode, in a forward of their own behind that of the twin; values are freed at
    their last use.

    Args:
        model: The float model.
        plan: The comparison.

    Raises:
        PairingError: It is no module, or is quantized.
        TraceError: It can't be traced.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        inner = float_model_of(model, _WHERE)
        self._plan, self._model = plan, inner
        self._probes: dict[str, _FloatProbe] = {}
        self._woven: fx.GraphModule | None = None
        self._noise = 0.0
        self._missing: list[str] = []
        self._floats: Callable[..., Any] = inner
        self._apart: list[_FloatProbe] = []
        if not plan.prepared.exported or isinstance(inner, fx.GraphModule):
            self._build(lambda: trace(inner))

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], start: Any) -> None:
        """Run the batch that the twin graph has just seen.

        Args:
            args: The batch, as positional arguments.
            kwargs: The batch, as keywords.
            start: The random state that the twin graph started from.
        """
        given = positional(self._plan.prepared.graph_module, args, kwargs, _WHERE)
        if self._woven is None:
            self._build(lambda: torch.export.export(self._model, given).module())
        assert self._woven is not None
        state = _rng.rng_state()
        _rng.set_rng_state(start)
        self._run(self._woven.forward, given)
        if not self._apart:
            self._look(given, start)
        _rng.set_rng_state(state)

    def _run(self, model: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        copies = _torch.tree_map_tensors(Tensor.clone, given)
        try:
            with as_given(model=True):
                return model(*copies)
        except FxqfixError:
            raise
        except Exception as error:  # a model can raise anything
            raise cannot_run("the float model", error, _WHERE, list(given)) from error

    def _look(self, given: tuple[Any, ...], start: Any) -> None:
        """Whether the two compute the same but for the quantizers: on the first batch."""
        values = []
        for model in (in_float(self._plan.prepared.graph_module), self._floats):
            _rng.set_rng_state(start)
            values.append(list(tensors_of([self._run(model, given)])))
        for pair in zip_longest(*values):
            self._apart.append(_FloatProbe(None))
            self._apart[-1](*pair)
        ends = [p.discrepancy for n, p in self._probes.items() if n.startswith("output ")]
        self._noise = sum(end.noise for end in ends if end is not None)

    def _build(self, make: Callable[[], fx.GraphModule]) -> None:
        models = [_still(_torch.copied(m)) for m in (self._plan.frozen, make())]
        self._floats = models[1]
        self._woven = _Weave(*models).woven(self._sites(models[0]), self._probes, self._missing)

    def _sites(self, frozen: fx.GraphModule) -> dict[fx.Node, tuple[str, str, QParams]]:
        """Quantizer's node -> name of what it quantizes, name of the site, grid."""
        nodes = {n.name: n for n in frozen.graph.nodes}
        return {
            nodes[tap.node.name]: (tap.producer.name, tap.site.name, tap.site.used)
            for tap in self._plan.prepared.activations
            if tap.site.used is not None
        }

    def into(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, each with what quantization costs there."""
        found = {name: probe.discrepancy for name, probe in self._probes.items()}
        return [replace(row, quantization=found.get(row.name)) for row in rows]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know about the figures."""
        said = [
            f"{name}: not beside the float model: {probe.problem}"
            for name, probe in self._probes.items()
            if probe.problem
        ]
        if self._missing:
            shown = ", ".join(self._missing[:5])
            said.append(f"{len(self._missing)} sites are no node of the float model: {shown}")
        found = [p.discrepancy for p in self._apart]
        total = sum((d for d in found if d is not None), Discrepancy())
        # A hundredth of the noise moves a figure by less than 1 dB, wherever float rounding ends.
        if total.noise > self._noise / 100:
            moved = list(_moved(self._model, self._plan.prepared.graph_module))
            why = (
                f"it was trained since ({len(moved)} layers have other weights, {moved[0]} first)"
                if moved
                else "other weights, moved BatchNorm statistics, rounding in half precision, or "
                "inputs in another order"
            )
            said.append(
                f"without its quantizers too the prepared model is {decibels(total.sqnr_db)} dB "
                f"from the float model at the outputs: {why}; quant. dB counts that"
            )
        return tuple(said)


def _still(model: fx.GraphModule) -> fx.GraphModule:
    """A copy in eval mode; an exported one refuses `eval`, and has the mode in its calls."""
    for module in model.modules():
        module.training = False
    return model


def _moved(model: nn.Module, prepared: nn.Module) -> Iterator[str]:
    """Layers that train with a fake-quant and have other weights than the float model's."""
    own = dict(prepared.named_modules())
    for path, module in model.named_modules():
        mine: Any = own.get(path)
        if hasattr(mine, "weight_fake_quant") and isinstance(module.weight, Tensor):
            weight = module.weight.to(mine.weight.device)
            if weight.shape != mine.weight.shape or not torch.equal(weight, mine.weight):
                yield path


class _Side:
    """One model whose nodes are copied into the common graph."""

    def __init__(self, name: str, model: fx.GraphModule, graph: fx.Graph) -> None:
        self.name, self.model, self.graph = name, model, graph
        self.env: dict[fx.Node, fx.Node] = {}
        self.todo = iter(list(model.graph.nodes))

    def step(self) -> fx.Node | None:
        """Copy one node; None at the end."""
        node: fx.Node | None = next(self.todo, None)
        if node is None or node.op in ("placeholder", "output"):
            return node
        new = self.graph.node_copy(node, lambda n: self.env[n])
        if node.op in ("call_module", "get_attr"):
            new.target = f"{self.name}.{node.target}"
        self.env[node] = new
        return node


class _Weave:
    """Both models in one graph: each value is compared as soon as both have it."""

    def __init__(self, prepared: fx.GraphModule, floats: fx.GraphModule) -> None:
        self.graph, self.root = fx.Graph(), nn.Module()
        models = {"prepared": prepared, "floats": floats}
        self.sides = [_Side(name, model, self.graph) for name, model in models.items()]
        for side in self.sides:
            self.root.add_module(side.name, side.model)
        self._inputs()
        self._kept: dict[fx.Node, fx.Node] = {}

    def _inputs(self) -> None:
        graphs = (side.model.graph.nodes for side in self.sides)
        own, theirs = ([n for n in nodes if n.op == "placeholder"] for nodes in graphs)
        if len(own) != len(theirs):
            raise PairingError(
                "the float model takes other inputs",
                where=_WHERE,
                found=", ".join(n.name for n in theirs) or "none",
                expected=", ".join(n.name for n in own),
            )
        given = [self.graph.node_copy(n) for n in own]  # inputs come first, with their defaults
        for side, nodes in zip(self.sides, (own, theirs), strict=True):
            for node, value in zip(nodes, given, strict=True):
                side.env[node] = self._module(f"{side.name}_in", Clone(), value)
        self.renamed = {a.name: b for a, b in zip(own, theirs, strict=True)}

    def _module(self, name: str, module: nn.Module, *args: Any) -> fx.Node:
        path = f"{name}_{len(self.root._modules)}"
        self.root.add_module(path, module)
        return self.graph.create_node("call_module", path, args)

    def woven(
        self,
        sites: dict[fx.Node, tuple[str, str, QParams]],
        probes: dict[str, _FloatProbe],
        missing: list[str],
    ) -> fx.GraphModule:
        """The graph; its probes are added to `probes`, sites without a partner to `missing`."""
        own, theirs = self.sides
        partners = {q: self._partner(name) for q, (name, _, _) in sites.items()}
        wanted = {partner for partner in partners.values() if partner is not None}
        while (node := own.step()) is not None:
            if node not in sites:
                continue
            _, name, grid = sites[node]
            partner = partners[node]
            if partner is None:
                missing.append(name)
                continue
            probe = probes[name] = _FloatProbe(grid)
            self._module("probe", probe, own.env[node], self._value(theirs, partner, wanted))
        while theirs.step() is not None:
            pass
        ends = returned(own.model.graph), returned(theirs.model.graph, own.model.graph)
        values = [[s.env[n] for n in nodes] for s, nodes in zip(self.sides, ends, strict=True)]
        self._module("probe", _Ends(probes), *values)
        self.graph.output(None)
        return fx.GraphModule(self.root, self.graph)

    def _value(self, side: _Side, node: fx.Node, wanted: set[fx.Node]) -> fx.Node:
        """The value of a float node; what is wanted later is kept from ops that write over it."""
        while node not in side.env:
            made = side.step()
            assert made is not None
            if made in wanted and made is not node:
                self._kept[made] = self._module("kept", Clone(), side.env[made])
        return self._kept.get(node, side.env[node])

    def _partner(self, name: str) -> fx.Node | None:
        """The float node of what is quantized: behind what prepare fused into the layer."""
        own, theirs = (s.model for s in self.sides)
        nodes = {n.name: n for n in theirs.graph.nodes if n.op != "output"}
        node = self.renamed.get(name) or nodes.get(name)
        stay = {n.name for n in own.graph.nodes if not _is_nothing(n, modules_of(own))}
        while node is not None and len(node.users) == 1:
            user = next(iter(node.users))
            if user.op == "output" or user.name in stay:
                break
            node = user
        return node


def _is_nothing(node: fx.Node, modules: Any) -> bool:
    """Whether it is what eager fusion leaves in a layer's place."""
    return node.op == "call_module" and type(modules.get(str(node.target))) is nn.Identity


class _Ends(nn.Module):
    """Compares what both return, tensor by tensor, as rows of outputs are counted."""

    def __init__(self, probes: dict[str, _FloatProbe]) -> None:
        super().__init__()
        self._probes = probes

    def forward(self, prepared: list[Any], floats: list[Any]) -> None:
        """Compare one batch."""
        values = [list(tensors_of(given)) for given in (prepared, floats)]
        for i, pair in enumerate(zip_longest(*values)):
            self._probes.setdefault(f"output {i}", _FloatProbe(None))(*pair)


class _FloatProbe(nn.Module):
    """Adds up how far a prepared value is from the float one.

    Args:
        grid: What the prepared value was quantized to; None for an output.
    """

    def __init__(self, grid: QParams | None) -> None:
        super().__init__()
        self.grid, self.problem = grid, ""
        self._sums: Tensor | None = None
        self._most: Tensor | None = None

    def forward(self, prepared: Any, floats: Any) -> None:
        """Compare one batch; numbers stay on the device."""
        tensors = isinstance(prepared, Tensor) and isinstance(floats, Tensor)
        if not tensors or prepared.shape != floats.shape:
            shapes = [tuple(getattr(v, "shape", ())) for v in (floats, prepared)]
            self.problem = f"its shape is {shapes[0]} there, {shapes[1]} here"
            return
        real, value = floats.double(), prepared.double()
        noise = (value - real).abs()
        if self.grid is None:
            lsb = (noise != 0).double()
            ends = [lsb.new_zeros(()), lsb.new_zeros(())]
        else:
            codes = [quantize(v, self.grid).double() for v in (floats, prepared)]
            lsb = (codes[1] - codes[0]).abs()
            ends = [codes[1] <= self.grid.quant_min, codes[1] >= self.grid.quant_max]
        parts = [lsb != 0, lsb, *ends, real * real, noise * noise, value * value, real * value]
        sums = torch.stack([p.double().sum() for p in parts] + [lsb.new_tensor(real.numel())])
        most = torch.stack([lsb.max(), noise.max()]) if real.numel() else lsb.new_zeros(2)
        self._sums = sums if self._sums is None else self._sums + sums
        self._most = most if self._most is None else torch.maximum(self._most, most)

    @property
    def discrepancy(self) -> Discrepancy | None:
        """All batches; None where nothing could be compared."""
        if self._sums is None or self._most is None or self.problem:
            return None
        differing, lsb, low, high, signal, noise, energy, product, count = self._sums.tolist()
        most_lsb, most = self._most.tolist()
        codes = self.grid is not None
        return Discrepancy(
            elements=int(count),
            differing=int(differing),
            max_lsb=int(most_lsb) if codes else 0,
            sum_lsb=int(lsb) if codes else 0,
            saturated_low=int(low),
            saturated_high=int(high),
            max_abs=most,
            signal=signal,
            noise=noise,
            energy=energy,
            product=product,
        )
