"""All ops in graph order, each computed by its reference on what a device had as its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxqfix.errors import UnsupportedError
from fxqfix.export.arithmetic import Arithmetic
from fxqfix.export.parameters import OpParameters, Parameters
from fxqfix.export.reference import Reference, Value

__all__ = ["Seen", "walk"]


@dataclass(frozen=True)
class Seen:
    """One op, on the device's own inputs to it.

    Attributes:
        reference: The op, as its arithmetic has it.
        inputs: What goes in: the device's values; where it gave none, what the reference makes of
            the device's values before.
        wanted: What the reference gives; None where it gives nothing (see `reason`).
        found: What the device gave; None where it gave nothing that can be compared.
        through: Names of the inputs that the device did not give.
        reason: Why nothing can be said here, "" where something can.
        image: (channels, height, width) of the image that a flattened input was.
    """

    reference: Reference
    inputs: tuple[Value, ...]
    wanted: Value | None
    found: Tensor | None
    through: tuple[str, ...] = ()
    reason: str = ""
    image: tuple[int, ...] = ()

    @property
    def op(self) -> OpParameters:
        """The op's parameters."""
        return self.reference.op


def walk(
    parameters: Parameters,
    arithmetic: Arithmetic,
    values: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    look: Callable[[Seen], Tensor | None],
) -> None:
    """Look at every op in graph order.

    A device's values say nothing of how they would lie in the reference's memory, by which some
    kernels choose their rounding: each is laid out as the reference lays out its own.

    Args:
        parameters: The ops.
        arithmetic: What computes them.
        values: Name -> what the device gave, the model's inputs included.
        shapes: Name -> shape of a result, where it is known: reshapes may need it.
        look: Sees each op. What it returns is what the ops behind read in place of what the device
            gave: a dump may hold the right codes in another form.
    """
    have: dict[str, Value] = {n: values[n] for n in parameters.inputs if n in values}
    through: dict[str, tuple[str, ...]] = {}
    images: dict[str, tuple[int, ...]] = {}
    for op in parameters:
        reference = Reference(op, arithmetic)
        lacking = [name for name in op.inputs if name not in have]
        inputs = tuple(have[name] for name in op.inputs if name in have)
        found, wanted, reason = values.get(op.name), None, ""
        if lacking:
            reason = f"its inputs are not known: {', '.join(lacking)}"
        else:
            shape = tuple(found.shape) if found is not None else shapes.get(op.name)
            try:
                wanted = reference.run(*inputs, shape=shape)
            except UnsupportedError as error:
                reason = f"{error.what}{f' ({error.found})' if error.found else ''}"
        image = _image(op, inputs, images)
        before = tuple(dict.fromkeys(n for name in op.inputs for n in through.get(name, ())))
        if isinstance(wanted, Tensor) and found is not None and found.shape != wanted.shape:
            sizes = (tuple(t.shape) for t in (found, wanted))
            reason = "its shape is {}, and {} is due".format(*sizes)
            found = None
        other = look(Seen(reference, inputs, wanted, found, before, reason, image))
        found = found if other is None else other
        if image:
            images[op.name] = image
        if found is not None:
            have[op.name] = _laid_out(found, wanted) if isinstance(wanted, Tensor) else found
        elif wanted is not None:
            have[op.name] = wanted
            through[op.name] = (*before, op.name)


def _laid_out(found: Tensor, like: Tensor) -> Tensor:
    """The values of one tensor in the strides of another, and in its dtype if that holds them."""
    if found.dtype == like.dtype and found.stride() == like.stride():
        return found
    fitting = torch.empty_like(like).copy_(found)
    if torch.equal(fitting.to(found.dtype), found):
        return fitting
    return torch.empty_like(like, dtype=found.dtype).copy_(found)


def _image(
    op: OpParameters, inputs: tuple[Value, ...], images: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """What a flattened value was before, as far as only boundaries and moves lie between."""
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        return ()
    x = inputs[0]
    if op.op in ("flatten", "reshape") and x.dim() == 4:
        return tuple(x.shape[1:])
    passes = op.op in ("quantize", "dequantize", "dropout", "identity", "contiguous", "relu")
    return images.get(op.inputs[0], ()) if passes else ()
