"""extract_parameters and golden_vectors: what an engine of your own needs, and has to give."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import _rng, _torch, dialects, engines
from fxqfix._devices import check_int8, device_of
from fxqfix._settings import as_given, entry
from fxqfix.dialects import int8
from fxqfix.dialects._finite import refuse_non_finite
from fxqfix.dialects._wrappers import refuse_code
from fxqfix.engines import Isa
from fxqfix.engines.dispatch import check_packed
from fxqfix.errors import DataError, FxqfixError, OptionError, UnsupportedError
from fxqfix.export import Arithmetic, GoldenVectors, OpParameters, Parameters, Program, steps
from fxqfix.export.arithmetic import DECOMPOSED
from fxqfix.flows.decompose import declared_ranges, to_decomposed
from fxqfix.measure import cannot_run, check_values, positional
from fxqfix.names import Engine, IsaName, RangesFrom
from fxqfix.qparams import QParams, quantize

__all__ = ["extract_parameters", "golden_vectors"]


@entry
def extract_parameters(
    model: nn.Module,
    *,
    ranges_from: RangesFrom | None = None,
    engine: Engine | None = None,
    isa: IsaName | Isa | None = None,
    threads: int | None = None,
) -> Parameters:
    """Read everything that a quantized model computes with, op by op, in graph order.

    Per op: what feeds it, its options, the grids of inputs and result, the integer weight, the
    float bias and the int32 bias ``rne(b * f(1 / f(xs * ws)))``, and the real multipliers
    ``f(f(xs * ws) / os)``, also as a fixed-point pair: an int32 in [2^30, 2^31) and a right shift
    of the 64-bit product, ``multiplier * 2^-shift`` (gemmlowp, TFLite).

    Args:
        model: What `convert_fx` or eager `convert` returned, a decomposed model, or a prepared
            one, which is taken through `to_decomposed`. It is not changed.
        ranges_from: For an int8 model, which has lost the declared quant_min / quant_max: the
            prepared model that it was converted from, or its QConfigMapping. Without it the
            ranges are those of the dtypes.
        engine: For an int8 model: the engine that it was converted for, which the parameters then
            name as their arithmetic. None means torch.backends.quantized.engine, or where the
            weights are packed for another one, that.
        isa: For an int8 model: the instruction set of the kernels, as for `emulate`.
        threads: For an int8 model: their number of threads.

    Returns:
        The parameters; they can be saved as .npz, .safetensors or .json.

    Raises:
        DialectError: The model is not quantized.
        RangeUnknownError: A reference model without `ranges_from`.
        UncalibratedError: The prepared model never saw data.
        UnknownNameError: There is no such engine or isa.
        OptionError: `isa` or `threads` has a value that it can't have, or one of the three is given
            for a model that runs on no engine.
        UnsupportedError: An op's parameters can't be read (LSTM, dynamic qparams, unknown ops), or
            its weight is packed for another engine, or a module has a hook of the user's.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import get_default_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
        >>> torch.backends.quantized.engine = "qnnpack"
        >>> x = torch.linspace(-1, 1, 8).reshape(1, 8)
        >>> mapping = get_default_qconfig_mapping("qnnpack")
        >>> prepared = prepare_fx(torch.nn.Sequential(torch.nn.Linear(8, 2)).eval(), mapping, (x,))
        >>> _ = prepared(x)
        >>> parameters = extract_parameters(convert_fx(prepared))
        >>> [op.op for op in parameters]
        ['quantize', 'linear', 'dequantize']
        >>> parameters.ops[1].weight.dtype, parameters.ops[1].layout
        (torch.int8, 'OI')
    """
    with torch.no_grad(), _rng.same_rng():
        program = _program(model, ranges_from, "extract_parameters")
        ops = tuple(OpParameters.of(step) for step in program.steps)
        arithmetic = _arithmetic(program, engine, isa, threads)
    return Parameters(ops, program.inputs, program.outputs, arithmetic)


def _arithmetic(
    program: Program, engine: str | None, isa: str | Isa | None, threads: int | None
) -> Arithmetic:
    if not int8.matches(program.graph_module):
        given = {"engine": engine, "isa": isa, "threads": threads}
        named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        if named:
            raise OptionError(
                "only an int8 model runs on an engine",
                where="extract_parameters",
                found=", ".join(named),
                remedy="leave it out, or pass what convert_fx or to_int8 returned",
            )
        return Arithmetic.of(DECOMPOSED)
    arithmetic = Arithmetic.of(engine or torch.backends.quantized.engine, isa, threads)
    calls = engines.calls(program.graph_module, "qnnpack", strict=False).values()
    names = [arithmetic.engine] if engine else [arithmetic.engine, *engines.ENGINES]
    refused: UnsupportedError | None = None
    for name in names:
        try:
            for call in calls:
                check_packed(call, name)
        except UnsupportedError as error:
            refused = refused or error
            continue
        return dataclasses.replace(arithmetic, engine=name)
    assert refused is not None  # there is a name, and each was refused
    raise refused


@entry
def golden_vectors(
    model: nn.Module, inputs: Any, *, ranges_from: RangesFrom | None = None
) -> GoldenVectors:
    """Run a quantized model node by node, and keep the codes of every op.

    Args:
        model: As for `extract_parameters`. It is not changed; an int8 model runs on its engine,
            a decomposed or prepared one in float arithmetic.
        inputs: What the model's forward takes: a tensor, a tuple of arguments, or a dict of
            keywords. They are not changed.
        ranges_from: For a reference model: as for `to_decomposed`. An int8 model needs none.

    Returns:
        Integer codes under the names that `extract_parameters` gives; floats at the model's own
        inputs and outputs only.

    Raises:
        DialectError: The model is not quantized.
        RangeUnknownError: A reference model without `ranges_from`.
        DataError: The inputs are not those of the model.
        NonFiniteError: NaN or inf in the inputs.
        DeviceError: The inputs are on another device than the model.
        UnsupportedError: A module has a hook of the user's.
        ModelRunError: The model raised.

    Example:
        >>> import torch
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         q = torch.quantize_per_tensor(x, 0.5, 3, torch.quint8)
        ...         return torch.ops.quantized.add(q, q, 1.0, 3).dequantize()
        >>> golden = golden_vectors(Net(), torch.tensor([1.0]))
        >>> [t.item() for t in golden.inputs_of("add")], golden.output_of("add")
        ([5, 5], tensor([5], dtype=torch.uint8))
    """
    with torch.no_grad(), _rng.same_rng():
        program = _program(model, ranges_from, "golden_vectors")
        if int8.matches(program.graph_module):
            check_int8(program.graph_module, "golden_vectors")
        names = {step.value.name: step for step in program.steps}
        grids = {step.value.name: step.output for step in program.steps}
        with _torch.quiet():  # deepcopy and some kernels warn of what the caller can't change
            recorder = _Recorder(copy.deepcopy(program.graph_module), {*program.inputs, *names})
            recorder.feed(inputs)
    values: dict[str, Tensor] = {}
    for node, seen in recorder.seen.items():
        name = names[node].name if node in names else node
        is_end = name in program.inputs or name in program.outputs
        for suffix, value in _parts(seen):
            codes = _codes(value, grids.get(node))
            if is_end or not codes.is_floating_point():
                values[f"{name}{suffix}"] = codes
    ops = {step.name: step.inputs for step in program.steps}
    return GoldenVectors(ops, values, program.inputs, program.outputs)


def _program(model: nn.Module, ranges_from: RangesFrom | None, where: str) -> Program:
    refuse_non_finite(model, where)
    reading = dialects.read(model, where)
    refuse_code(model, where)
    if reading.has_kernels:
        ranges = None if ranges_from is None else declared_ranges(reading, ranges_from)
        return steps(reading, ranges)
    if not reading.carries_ranges:
        reading = dialects.read(to_decomposed(reading.graph_module, ranges_from=ranges_from))
    return steps(reading)


def _parts(value: Any) -> list[tuple[str, Tensor]]:
    """A tensor, or the tensors of a tuple with their places."""
    if isinstance(value, Tensor):
        return [("", value)]
    if isinstance(value, list | tuple):
        return [(f".{i}", part) for i, part in enumerate(value) if isinstance(part, Tensor)]
    return []


def _codes(value: Tensor, grid: QParams | None) -> Tensor:
    if value.is_quantized:
        return value.int_repr()
    if grid is not None and value.is_floating_point():  # moved behind its dequantize
        return quantize(value, grid).to(grid.storage)
    return value


class _Recorder(fx.Interpreter):
    """Keeps copies of some nodes' values, as they are when they are made."""

    def __init__(self, graph_module: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.given = graph_module
        self.wanted = wanted
        self.seen: dict[str, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        """Run it and keep what comes out."""
        value = super().run_node(node)
        if node.name in self.wanted:
            self.seen[node.name] = _torch.tree_map_tensors(
                lambda t: t.detach().cpu().clone(), value
            )
        return value

    def feed(self, inputs: Any) -> None:
        """Run everything on copies of the inputs."""
        names = [str(n.target) for n in self.graph.nodes if n.op == "placeholder"]
        if isinstance(inputs, Mapping):
            if not inputs.keys() <= set(names):
                raise _not_taken(sorted(inputs), names)
            inputs = positional(self.given, (), inputs, "golden_vectors")
        args = inputs if isinstance(inputs, list | tuple) else (inputs,)
        if not args or len(args) > len(names):
            raise _not_taken(f"{len(args)} inputs", names)
        check_values(self.given, "golden_vectors", args, device_of(self.given))
        try:
            with as_given(model=True):
                self.run(*_torch.tree_map_tensors(Tensor.clone, tuple(args)))
        except FxqfixError:
            raise
        except Exception as error:  # a model can raise anything
            raise cannot_run("the model", error, "golden_vectors", args) from error


def _not_taken(found: object, names: list[str]) -> DataError:
    return DataError(
        "the inputs are not those of the model",
        where="golden_vectors",
        found=found,
        expected=", ".join(names),
    )
