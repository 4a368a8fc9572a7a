"""sensitivity: what leaving each module in float would win at the outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import _rng, _torch, dialects
from fxqfix._settings import as_given, entry
from fxqfix.comparison import float_model_of, in_float
from fxqfix.dialects import Reading, Tap
from fxqfix.dialects._wrappers import copied
from fxqfix.dialects.site import closest
from fxqfix.errors import FxqfixError, PairingError, UnknownNameError, UnsupportedError
from fxqfix.flows.compare import prepared_reading
from fxqfix.measure import Discrepancy, Run, cannot_run, positional, streamed, tensors_of
from fxqfix.passes import FreezeQParams
from fxqfix.report import LeftInFloat, Sensitivity

__all__ = ["sensitivity"]

_WHERE = "sensitivity"
_PLAIN = " without quantizers"  # no path of a module


@entry
def sensitivity(
    prepared: nn.Module,
    data: Iterable[Any],
    *,
    float_model: nn.Module,
    modules: Sequence[str] | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Leave one module at a time in float, and say what the outputs win.

    A module in float keeps its float weights. A value that it gives or takes stays quantized where
    another quantized op gives or takes it, as torch's own prepare has it for modules. (It leaves
    more in float in places, a `torch.relu` behind a float layer say: prepare anew, then compare.)
    All models run in eval mode on copies.

    Args:
        prepared: The prepared model, FX or eager, trained or calibrated.
        data: Any iterable of batches, read once, as for `compare`.
        float_model: What was prepared; its outputs are the reference.
        modules: Paths to leave in float, a block's path for all in it; None for every module that
            has a quantized weight.
        progress: Show a bar (needs tqdm); None shows it on a terminal only.

    Returns:
        The modules, those first that win most, and the qconfig that leaves them in float.

    Raises:
        PairingError: The two models return other tensors, or the float model is quantized.
        UnsupportedError: The model is prepared by PT2E, which has no qconfig.
        UnknownNameError: Nothing is quantized in a module of that path.
        FxqfixError: Another, as for `compare`.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import get_default_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import prepare_fx
        >>> x, net = torch.ones(2, 8), torch.nn.Sequential(torch.nn.Linear(8, 2)).eval()
        >>> prepared = prepare_fx(net, get_default_qconfig_mapping("fbgemm"), (x,))
        >>> _ = prepared(x)
        >>> found = sensitivity(prepared, [x], float_model=net)
        >>> [(row.name, row.quantizers, row.after.sqnr_db) for row in found.rows]
        [('0', 3, inf)]
    """
    reading = prepared_reading(prepared, f"{_WHERE}(prepared, data, float_model=...)")
    _refuse_exported(reading)
    parts = _Parts.of(reading)
    variants = {n: parts.without(n) for n in (parts.weighted() if modules is None else modules)}
    models = {"": parts.run} | {name: variant.run for name, variant in variants.items()}
    models[_PLAIN] = in_float(reading.graph_module)
    reference = copied(float_model_of(float_model, _WHERE), _WHERE).eval()
    found, batches = _found(parts.model, reference, models, data, progress)
    whole, plain = found.pop(""), found.pop(_PLAIN)
    rows = [
        LeftInFloat(name, variants[name].count, after, _gain(whole, after))
        for name, after in found.items()
    ]
    return Sensitivity(tuple(sorted(rows, key=lambda r: -r.gain_db)), whole, batches, plain)


def _refuse_exported(reading: Reading) -> None:
    if reading.exported:
        raise UnsupportedError(
            "models of PT2E have no qconfig, and are not tried layer by layer",
            where=_WHERE,
            found=f"a model of dialect {reading.dialect}",
            remedy="compare(..., float_model=...) says what quantization costs at each site",
        )


def _found(
    model: fx.GraphModule,
    reference: nn.Module,
    models: Mapping[str, Callable[..., Any]],
    data: Iterable[Any],
    progress: bool | None,
) -> tuple[dict[str, Discrepancy], int]:
    """The outputs of each model against the reference's, and how many batches there were."""
    found, result = dict.fromkeys(models, Discrepancy()), Run()
    with torch.no_grad(), _rng.same_rng():
        for args, kwargs in streamed(model, data, result, where=_WHERE, progress=progress):
            given = positional(model, args, kwargs, _WHERE)
            wanted = _outputs(reference, given)
            for name, run in models.items():
                found[name] += _apart(wanted, _outputs(run, given))
    return found, result.batches


def _gain(before: Discrepancy, after: Discrepancy) -> float:
    return after.sqnr_db - before.sqnr_db if before.noise else 0.0


def _outputs(model: Callable[..., Any], given: tuple[Any, ...]) -> list[Tensor]:
    copies = _torch.tree_map_tensors(Tensor.clone, given)
    try:
        with as_given(model=True):
            return list(tensors_of([model(*copies)]))
    except FxqfixError:
        raise
    except Exception as error:  # a model can raise anything
        raise cannot_run("the model", error, _WHERE, list(given)) from error


def _apart(wanted: list[Tensor], found: list[Tensor]) -> Discrepancy:
    """All outputs together, value by value."""
    if [t.shape for t in wanted] != [t.shape for t in found]:
        shapes = [", ".join(str(tuple(t.shape)) for t in tensors) for tensors in (wanted, found)]
        raise PairingError(
            "the two models return other tensors",
            where=_WHERE,
            found=f"{shapes[0] or 'none'} of the float model",
            expected=f"{shapes[1] or 'none'} as the prepared model",
        )
    total = Discrepancy()
    for real, value in zip(wanted, found, strict=True):
        a, b = real.double(), value.double()
        noise = (b - a).abs()
        total += Discrepancy(
            elements=a.numel(),
            differing=int((noise != 0).sum()),
            max_abs=float(noise.max()) if a.numel() else 0.0,
            signal=float(a.square().sum()),
            noise=float(noise.square().sum()),
            energy=float(b.square().sum()),
            product=float((a * b).sum()),
        )
    return total


class _Partly(fx.Interpreter):
    """A frozen graph in which some readers get floats, and some modules are in float.

    Args:
        model: The frozen graph.
        raw: (quantizer, reader that gets its input in place of its result).
        floats: Path -> the module that runs in its place.
        count: Quantizers that nothing reads any more.
    """

    extra_traceback = False

    def __init__(
        self,
        model: fx.GraphModule,
        raw: frozenset[tuple[fx.Node, fx.Node]],
        floats: Mapping[str, nn.Module],
        count: int,
    ) -> None:
        super().__init__(model)
        self._raw, self._floats, self.count = raw, floats, count
        self._quantizers = {quantizer for quantizer, _ in raw}
        self._kept: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, as this variant has it."""
        if n in self._quantizers:
            self._kept[n] = self.env[n.all_input_nodes[0]].clone()  # an in-place op may follow
        if n.op == "call_module" and str(n.target) in self._floats:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self._floats[str(n.target)](*args, **kwargs)
        found = super().run_node(n)
        if n.op == "output":
            self._kept.clear()
        return found

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """The values that a node reads."""
        return fx.map_arg(args, lambda a: self._kept[a] if (a, n) in self._raw else self.env[a])


@dataclass(frozen=True)
class _Parts:
    """The frozen model, and what can be left in float of it.

    Attributes:
        model: The frozen graph, in eval mode.
        prepared: The user's graph, for the float weights of calibrated models.
        taps: The sites of the frozen graph.
    """

    model: fx.GraphModule
    prepared: fx.GraphModule
    taps: tuple[Tap, ...]

    @classmethod
    def of(cls, reading: Reading) -> _Parts:
        """Freeze a model."""
        frozen: fx.GraphModule = FreezeQParams(uncalibrated=True)(reading.graph_module).graph_module
        return cls(frozen.eval(), reading.graph_module, dialects.read(frozen).taps)

    def run(self, *args: Any) -> Any:
        """The model, quantized as a whole."""
        return self.model(*args)

    def weighted(self) -> list[str]:
        """The modules that have a quantized weight."""
        found = (tap.site.module for tap in self.taps if tap.site.kind == "weight")
        return [name for name in dict.fromkeys(found) if name]

    def without(self, name: str) -> _Partly:
        """The model with a module in float."""
        inside = {tap for tap in self.taps if f"{tap.site.module}.".startswith(f"{name}.")}
        if not inside or not name:
            known = list(dict.fromkeys(t.site.module for t in self.taps if t.site.module))
            raise UnknownNameError(
                f"nothing is quantized in a module {name!r}",
                where=_WHERE,
                expected=", ".join(closest(name, known)),
            )
        raw, floats = set[tuple[fx.Node, fx.Node]](), {}
        for tap in self.taps:
            if tap.site.kind != "weight":
                raw |= {(tap.node, user) for user in self._in_floats(tap, inside)}
            elif tap in inside and tap.quantizer is not None:
                raw |= {(tap.quantizer, user) for user in tap.quantizer.users}
            elif tap in inside and tap.node.op == "call_module":
                floats[str(tap.node.target)] = self._in_float(str(tap.node.target))
        gone = sum(all((q, u) in raw for u in q.users) for q in {q for q, _ in raw})
        return _Partly(self.model, frozenset(raw), floats, gone + len(floats))

    def _in_float(self, path: str) -> nn.Module:
        """A module with its float weights; all but its quantizers is shared."""
        own = self.model.get_submodule(path)
        if hasattr(own, "weight_fake_quant"):
            return _unquantized(own)
        module = copy.copy(self.prepared.get_submodule(path))
        parts = {name: copied(part, _WHERE) for name, part in module.named_children()}
        module._modules = {**module._modules, **parts}
        return module.eval()

    def _in_floats(self, tap: Tap, inside: set[Tap]) -> Iterator[fx.Node]:
        """Which readers of a value get it as a float: those that lead to no op outside."""
        if tap not in inside and tap.producer.op != "placeholder":
            return
        readers = {user: set(self._readers(user)) for user in tap.node.users}
        if tap in inside or any(found & inside for found in readers.values()):
            yield from (user for user, found in readers.items() if found <= inside)

    def _readers(self, node: fx.Node) -> Iterator[Tap]:
        """The sites computed from what a node gives, or the one that it makes."""
        makers = {tap.producer: tap for tap in self.taps if tap.site.kind == "activation"}
        queue, seen = [node], set[fx.Node]()
        while queue:
            user = queue.pop()
            if user in seen:
                continue
            seen.add(user)
            if user in makers:
                yield makers[user]
            else:
                queue.extend(user.users)


def _unquantized(module: nn.Module) -> nn.Module:
    found = copy.copy(module)
    found._modules = {**module._modules, "weight_fake_quant": nn.Identity()}
    return found
