"""What an op computes, by its parameters alone: the kernel's integers, or the decomposed ops.

Neither a model nor a quantized op of torch is asked: the rows of `engines` give the kernels'
arithmetic, the forms of `export.forms` what stands between quantize and dequantize.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from fxqfix.dialects.weights import WeightView
from fxqfix.engines import Call, placed, row_of
from fxqfix.errors import FxqfixError, UnsupportedError
from fxqfix.export.arithmetic import Arithmetic
from fxqfix.export.forms import FORMS, MOVES, convolution, key_of
from fxqfix.export.parameters import OpParameters
from fxqfix.qparams import QParams, dequantize, quantize

__all__ = ["Reference", "Value", "call_of"]

Value = Tensor | tuple[Tensor, ...]
# Of records that are in use: building a kernel takes longer than running it.
_KERNELS: WeakKeyDictionary[OpParameters, dict[Arithmetic, nn.Module | None]] = WeakKeyDictionary()


def call_of(op: OpParameters, arithmetic: Arithmetic) -> Call:
    """The call that a kernel's builder gets, of parameters alone.

    Args:
        op: The op.
        arithmetic: That of an engine.
    """
    key, relu = key_of(op.op)
    graph = fx.Graph()
    options = dict(op.options)
    module = None
    if options.get("padding_mode", "zeros") != "zeros":  # kernels ask a module for it
        module = nn.Module()
        for name, value in options.items():
            setattr(module, name, value)
    weight = None
    if op.weight is not None and op.weight_qparams is not None:
        weight = WeightView(op.weight, op.weight_qparams, op.bias)
    call = Call(
        node=op.name,
        engine=arithmetic.engine,
        key=key,
        relu=relu,
        arguments=options | dict(op.tensors),
        module=module,
        inputs=tuple(graph.placeholder(f"x{i}") for i in range(len(op.inputs))),
        qparams=op.input_qparams,
        output=op.output,
        weight=weight,
        threads=arithmetic.threads,
        point_first=arithmetic.point_first,
        release=arithmetic.release,
    )
    assert arithmetic.isa is not None  # the decomposed ops have no kernel
    return placed(call, arithmetic.engine, arithmetic.isa)


class Reference:
    """One op, as its arithmetic has it.

    Attributes:
        op: The op.
        arithmetic: What computes it.
        key: Key of its row, without "_relu".
        relu: Whether a relu is fused.

    Example:
        >>> from fxqfix.export import Arithmetic, OpParameters, Reference
        >>> from fxqfix import QParams
        >>> grid = QParams(0.5, 2, 0, 255, torch.quint8)
        >>> op = OpParameters("r", "relu", inputs=("x",), input_qparams=(grid,), output=grid)
        >>> Reference(op, Arithmetic.of("qnnpack", "vnni", 1)).run(torch.tensor([0, 5]))
        tensor([2, 5])
    """

    def __init__(self, op: OpParameters, arithmetic: Arithmetic) -> None:
        self.op, self.arithmetic = op, arithmetic
        self.key, self.relu = key_of(op.op)

    @property
    def moves(self) -> bool:
        """Whether the op only moves values."""
        return self.key in MOVES

    @cached_property
    def call(self) -> Call | None:
        """The kernel's call; None for decomposed ops, and for ops on floats."""
        floats = self.op.output is None and not any(self.op.input_qparams)
        if self.arithmetic.decomposed or floats:
            return None
        return call_of(self.op, self.arithmetic)

    @cached_property
    def kernel(self) -> nn.Module | None:
        """The module that computes codes; None where there is none.

        Raises:
            UnsupportedError: No row follows the kernel.
        """
        built = _KERNELS.setdefault(self.op, {})
        if self.arithmetic not in built:
            call = self.call
            build = None if call is None else row_of(call).build
            built[self.arithmetic] = None if build is None or call is None else build(call)
        return built[self.arithmetic]

    def run(self, *inputs: Value, shape: tuple[int, ...] | None = None) -> Value:
        """The result: codes, held in the model's own limits, or floats.

        Args:
            inputs: Codes where the input has a grid, else floats.
            shape: The result's shape where it is known: reshapes may need it.

        Raises:
            UnsupportedError: No formula is known for the op.
        """
        try:
            with torch.no_grad():
                found = self._run(inputs, shape)
        except FxqfixError:
            raise
        except Exception as error:  # of inputs of other shapes, torch raises anything
            raise UnsupportedError(
                "the reference can't be computed",
                where=f"op {self.op.name!r}",
                found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            ) from error
        return found

    def _run(self, inputs: Sequence[Value], shape: tuple[int, ...] | None) -> Value:
        if self.moves and not isinstance(inputs[0], Tensor):  # one of several values
            one: Value = MOVES[self.key](self.op.options, inputs[0], shape)
            source = self.op.input_qparams[0]
            if not isinstance(one, Tensor) or one.is_floating_point() or source is None:
                return self._quantized(one)
            return self._quantized(dequantize(one, source)) if self._regrids else self._held(one)
        if self.moves and not self._regrids:
            moved: Value = MOVES[self.key](self.op.options, inputs[0], shape)
            return self._held(moved)
        kernel = self.kernel
        if kernel is not None:
            result: Tensor = kernel(*inputs)
            return self._held(result)
        if self.call is not None and not self.moves:
            raise self._unknown()
        return self._decomposed(inputs, shape)

    @property
    def _regrids(self) -> bool:
        """Whether what is moved is quantized anew."""
        source, grid = (*self.op.input_qparams, None)[0], self.op.output
        if grid is None:
            return False
        return source is None or not source.same_grid(grid)

    def _decomposed(self, inputs: Sequence[Value], shape: tuple[int, ...] | None) -> Value:
        """Dequantize, the float op, quantize; in float32, as the graph's own ops are."""
        values = [
            dequantize(x, q) if q is not None and isinstance(x, Tensor) else x
            for x, q in zip(inputs, self.op.input_qparams, strict=True)
        ]
        return self._quantized(self.real(values, shape))

    def real(self, values: Sequence[Any], shape: tuple[int, ...] | None = None) -> Any:
        """The op on real values, in their dtype.

        Args:
            values: Floats.
            shape: The result's shape where it is known.

        Raises:
            UnsupportedError: No formula is known for the op.
        """
        if self.op.weight is not None and self.op.weight_qparams is not None:
            if not (self.key.startswith("conv") or self.key == "linear"):
                raise self._unknown()
            weight = dequantize(self.op.weight, self.op.weight_qparams).to(values[0].dtype)
            bias = None if self.op.bias is None else self.op.bias.to(values[0].dtype)
            found = convolution(self.key, self.op.options, values[0], weight, bias)
        elif self.key in ("quantize", "dequantize", "hold_range"):
            found = values[0]
        elif self.moves:
            found = MOVES[self.key](self.op.options, values[0], shape)
        elif self.key in FORMS:
            found = FORMS[self.key](self.op.options, values)
        else:
            raise self._unknown()
        return torch.relu(found) if self.relu else found

    def _quantized(self, value: Any) -> Value:
        grid = self.op.output
        if grid is None or not isinstance(value, Tensor):
            return value  # type: ignore[no-any-return]  # floats, or several of them
        return quantize(value, _within(grid, self.op.limits)).to(grid.storage)

    def _held(self, found: Value) -> Value:
        """The range that a model holds by a clamp of its own."""
        limits, grid = self.op.limits, self.op.output
        if limits is None or grid is None or not isinstance(found, Tensor):
            return found
        return found if limits == grid.container else found.clamp(*limits)

    def _unknown(self) -> UnsupportedError:
        return UnsupportedError(
            f"no formula is known for {self.op.op!r} by its parameters alone",
            where=f"op {self.op.name!r}",
        )


def _within(grid: QParams, limits: tuple[int, int] | None) -> QParams:
    return grid if limits is None else grid.with_range(*limits)
