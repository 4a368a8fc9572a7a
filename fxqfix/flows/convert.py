"""torch's own conversion of a copy of a prepared model."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn

from fxqfix import _pt2e, _rng, _torch
from fxqfix._devices import CPU, device_of
from fxqfix.dialects import pt2e, read, unwrapped
from fxqfix.dialects._wrappers import copied, held_graphs
from fxqfix.errors import DialectError, FxqfixError, PassError, UnsupportedError

__all__ = ["convert_by_torch"]

_OBSERVE = (
    "give these sites an observer of torch.quint8 with one scale per tensor; eager mode makes "
    "dynamic models by torch.ao.quantization.quantize_dynamic alone"
)
_CONVERT = (
    "see whether torch's own conversion takes this model on this engine; one that needs a config "
    "of its own can be made by hand and given to compare(prepared, converted, data)"
)


def convert_by_torch(prepared: nn.Module, backend_config: Any = None) -> nn.Module:
    """Convert a copy with `convert_fx` (FX, on the engine in force), `convert` or `convert_pt2e`.

    int8 kernels are the CPU's: a model elsewhere is copied there first, but for PT2E's.

    Args:
        prepared: A prepared model; it is not changed. FX and PT2E graphs that an eager model holds
            are converted each by its own flow.
        backend_config: For convert_fx; None is torch's own.

    Returns:
        The int8 model; from a PT2E model the decomposed one.

    Raises:
        DialectError: A GraphModule that none of torch's flows prepared.
        MissingDependencyError: No convert_pt2e is installed.
        PassError: torch's conversion raised.
        UnsupportedError: The model can't be copied.
    """
    model = copied(unwrapped(prepared), "convert", UnsupportedError)
    exported = isinstance(model, fx.GraphModule) and pt2e.matches(model)
    if device_of(model, "convert") != CPU and not exported:
        model = model.cpu()
    try:
        with _torch.quiet(), _rng.same_rng(), torch.no_grad():
            return _converted(model, backend_config)
    except FxqfixError:
        raise
    except Exception as error:  # whatever torch raises, the caller has to see which step it was
        raise PassError(
            f"torch's own conversion failed: {type(error).__name__}: {error}",
            where="convert",
            found=(odd := _odd_sites(prepared)),
            remedy=_OBSERVE if odd else _CONVERT,
        ) from error


def _converted(model: nn.Module, backend_config: Any = None) -> nn.Module:
    if not isinstance(model, fx.GraphModule):
        return _eager(model)
    if pt2e.matches(model):
        return _pt2e.convert(model)
    if _torch.observed_attributes(model) is not None:
        _torch.quantization()
        make = _torch.resolve("torch.ao.quantization.quantize_fx.convert_fx")
        options = {"convert_custom_config": _closed(model), "backend_config": backend_config}
        found: fx.GraphModule = make(model, **options)
        _check_packing(found)
        return found
    raise DialectError(
        "torch can't convert this graph: prepare_fx / prepare_qat_fx did not make it",
        where="convert",
        remedy="pass what torch prepared, an eager model as it is and not its trace; or the "
        "converted model too: compare(prepared, converted, data)",
    )


def _eager(model: nn.Module) -> nn.Module:
    """Eager conversion of all but the graphs that the model holds; those have their own flow."""
    held = [(path, _converted(graph)) for path, graph in held_graphs(model)]
    for path, _ in held:
        _put(model, path, nn.Identity())
    found: nn.Module = model.eval()
    if not held or any(_torch.is_quantizer(m) for m in model.modules()):
        custom = _closed(found)["observed_to_quantized_custom_module_class"]["static"]
        found = _torch.quantization().convert(
            found, convert_custom_config_dict={"observed_to_quantized_custom_module_class": custom}
        )
    for path, graph in held:
        _put(found, path, graph)
    return found


def _check_packing(converted: fx.GraphModule) -> None:
    """Refuse what torch packs at run time and forgets an argument of: a weight given as input."""
    for node in converted.graph.nodes:
        name = str(node.target)
        if "_prepack" not in name or node.op != "call_function":
            continue
        schema = getattr(node.target, node.target.overloads()[0])._schema
        due = [a.name for a in schema.arguments if not a.has_default_value()]
        missing = [a for a in due[len(node.args) :] if a not in node.kwargs]
        if missing:
            raise PassError(
                "torch converts an op whose weight is no parameter to one that can't run",
                where="convert",
                found=f"{node.format_node()}, without {', '.join(missing)}",
                remedy="make the weight a parameter, or give the op no qconfig; "
                "fxqfix.to_decomposed takes it as it is",
            )


def _closed(model: nn.Module) -> dict[str, Any]:
    """The custom config of LSTM and attention; a user's subclasses convert as their bases do."""
    name = "observed_to_quantized_custom_module_class"
    mapping = dict(_torch.closed_modules()[name]["static"])  # torch hands out its own dict
    for kind in {type(m) for m in model.modules()} - mapping.keys():
        base = next((base for base in kind.__mro__ if base in mapping), None)
        if base is not None:
            mapping[kind] = mapping[base]
    return {name: {"static": mapping}}


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _odd_sites(prepared: nn.Module) -> str | None:
    """The activations that int8 kernels can't have, which torch tells of in words of its own."""
    found: list[str] = []
    with suppress(FxqfixError):
        for tap in read(prepared, "convert").activations:
            used = tap.site.used
            if used is None:
                found.append(f"{tap.site.name!r}: {tap.site.source}")
            elif used.axis is not None:
                found.append(f"{tap.site.name!r}: observed per channel")
            elif used.dtype not in (torch.quint8, torch.uint8, torch.qint8, torch.int8):
                found.append(f"{tap.site.name!r}: {used.dtype}")
    return "; ".join(found[:5]) or None
