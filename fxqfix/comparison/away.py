"""An int8 model beside a prepared one that is not on the CPU: its emulation runs there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from fxqfix import ops
from fxqfix.dialects import Reading, int8
from fxqfix.dialects._base import modules_of
from fxqfix.engines import Call, Isa
from fxqfix.engines.dispatch import check_packed
from fxqfix.errors import DeviceError, UnsupportedError
from fxqfix.names import Engine
from fxqfix.passes import EmulateEngine
from fxqfix.passes._ends import returned
from fxqfix.passes._in_integers import run_in_integers
from fxqfix.qparams import QParams

__all__ = ["Away"]


@dataclass(frozen=True)
class Away:
    """Where the prepared model is, and what runs there in the int8 model's place.

    Attributes:
        home: The prepared model's device.
        emulation: The emulated model, on that device.
        grids: By node the grids of the quantized values that the int8 model returns.
        note: What a reader of the report has to know.
    """

    home: torch.device
    emulation: fx.GraphModule
    grids: dict[str, QParams]
    note: str

    @classmethod
    def of(
        cls,
        converted: Reading,
        calls: Iterable[Call],
        options: tuple[Engine, Isa, int],
        home: torch.device,
    ) -> Away:
        """Emulate an int8 model on a device.

        Args:
            converted: The int8 model.
            calls: Its ops.
            options: Engine, isa and threads.
            home: The device.

        Raises:
            DeviceError: An op of it can't be emulated.
        """
        engine, isa, threads = options
        try:
            for call in calls:
                check_packed(call, engine)
            made: fx.GraphModule = EmulateEngine(*options)(converted.graph_module).graph_module
            grids = _returned(converted.graph_module)
        except UnsupportedError as error:
            raise DeviceError(
                f"the int8 model can't be emulated: {error}",
                where="compare",
                found=f"the prepared model on {home}, where no int8 kernel runs",
                remedy="compare on the CPU: pass prepared.cpu() and batches on the CPU",
            ) from error
        how = f"{engine}, isa {isa}, threads {threads}"
        note = f"the int8 model was emulated on {home} ({how}): its kernels run on the CPU"
        return cls(home, made.to(home), grids, note)

    def put(self, model: fx.GraphModule) -> fx.GraphModule:
        """The int8 graph, or one woven from it, with the emulated ops, on the device."""
        run_in_integers(model, self.emulation, self.grids)
        return model.to(self.home)


def _returned(model: fx.GraphModule) -> dict[str, QParams]:
    known, modules, found = int8.propagate(model), modules_of(model), dict[str, QParams]()
    for node in returned(model.graph):
        match = ops.match_node(node, modules)
        if node in known:
            found[node.name] = known[node]
        elif match is not None and match.column == "int8" and match.spec.output == "tuple":
            raise UnsupportedError(
                "it returns several quantized tensors of one module as they come",
                where=f"node {node.name!r}",
                remedy="return its parts, each dequantized",
            )
    return found
