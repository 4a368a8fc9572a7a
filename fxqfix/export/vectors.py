"""Golden vectors: the codes that go into and come out of every op, for one input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fxqfix.errors import UnknownNameError
from fxqfix.export._files import Arrays, Stored

__all__ = ["GoldenVectors"]


@dataclass(frozen=True, eq=False)
class GoldenVectors(Stored):
    """The values of a quantized model, per op, for one input.

    Attributes:
        ops: Op name -> names of what feeds it; the names are those of `Parameters`.
        values: Name -> integer codes. Only the model's own inputs and outputs are floats; floats
            in between have no entry.
        inputs: Names of the model's inputs.
        outputs: Names of what the model returns.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import get_default_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
        >>> x = torch.linspace(-1, 1, 8).reshape(1, 8)
        >>> mapping = get_default_qconfig_mapping("fbgemm")
        >>> prepared = prepare_fx(torch.nn.Sequential(torch.nn.Linear(8, 2)).eval(), mapping, (x,))
        >>> _ = prepared(x)
        >>> import fxqfix
        >>> golden = fxqfix.golden_vectors(convert_fx(prepared), x)
        >>> [codes.dtype for codes in golden.inputs_of("_0")]
        [torch.uint8]
    """

    ops: Mapping[str, tuple[str, ...]]
    values: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    KIND: ClassVar[str] = "fxqfix-golden-vectors"

    def inputs_of(self, name: str) -> tuple[Tensor, ...]:
        """What goes into an op, in order."""
        return tuple(map(self.output_of, self._known(name, self.ops)))

    def output_of(self, name: str) -> Tensor:
        """What comes out of an op (or is the model's input of that name)."""
        found: Tensor = self._known(name, self.values)
        return found

    def _known(self, name: str, table: Mapping[str, Any]) -> Any:
        if name in table:
            return table[name]
        raise UnknownNameError(
            f"there are no codes of {name!r}",
            where="GoldenVectors",
            expected=f"one of {', '.join(table)}",
            remedy="an op whose result is a float inside the model has none",
        )

    def to_parts(self) -> tuple[dict[str, Any], Arrays]:
        """The header (a JSON object) and the tensors by "value/name", as the files hold them."""
        header = {
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "ops": {name: list(feeding) for name, feeding in self.ops.items()},
            "names": list(self.values),
        }
        return header, {f"value/{name}": value for name, value in self.values.items()}

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], arrays: Arrays) -> GoldenVectors:
        """The record that `to_parts` took apart."""
        return cls(
            {name: tuple(feeding) for name, feeding in header["ops"].items()},
            {name: arrays[f"value/{name}"] for name in header["names"]},
            tuple(header["inputs"]),
            tuple(header["outputs"]),
        )

    def __str__(self) -> str:
        """Render a line per value."""
        lines = [
            f"{name}  {'x'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"
            for name, value in self.values.items()
        ]
        return "\n".join(lines)
