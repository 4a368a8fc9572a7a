"""What vanishes at the end when one site alone is corrected: one more forward per candidate.

To correct a site is to put there what the prepared op gives on the converted model's own inputs,
and to run the rest of the converted model. Feeding the prepared model's own value instead would
take back all that is upstream of the site as well, and always name the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix import _rng, _torch
from fxqfix._notebook import Shown
from fxqfix._regrid import regrid
from fxqfix._settings import as_given
from fxqfix.measure.discrepancy import Discrepancy, decibels
from fxqfix.measure.probe import Probe
from fxqfix.measure.sums import Sums
from fxqfix.passes.insert_shadows import Probing
from fxqfix.qparams import QParams, dequantize

__all__ = ["Corrector", "Culprit"]


@dataclass(frozen=True)
class Culprit(Shown):
    """What correcting one site alone does to the values that the model ends in.

    Attributes:
        name: The site.
        before: The converted model's last sites against the prepared model's own values.
        after: The same with this site corrected.

    Example:
        >>> worse, better = Discrepancy(elements=9, differing=8), Discrepancy(9, differing=2)
        >>> Culprit("conv", worse, better).vanished
        6
    """

    name: str
    before: Discrepancy
    after: Discrepancy

    @property
    def vanished(self) -> int:
        """Differing codes less; below zero where other errors had cancelled this one."""
        return self.before.differing - self.after.differing

    @property
    def share(self) -> float:
        """`vanished` over all codes that differ at the end; 0 where none does."""
        return self.vanished / self.before.differing if self.before.differing else 0.0

    @property
    def gain_db(self) -> float:
        """SQNR at the end, after less before, in dB; 0 where nothing differed."""
        return self.after.sqnr_db - self.before.sqnr_db if self.before.noise else 0.0

    def __str__(self) -> str:
        """Say it in one sentence."""
        return (
            f"{self.name}: corrected alone, {self.vanished} of {self.before.differing} differing "
            f"codes at the end vanish, SQNR {decibels(self.before.sqnr_db)} -> "
            f"{decibels(self.after.sqnr_db)} dB"
        )

    def __add__(self, other: Culprit) -> Culprit:
        """The same site on more data."""
        return Culprit(self.name, self.before + other.before, self.after + other.after)


class Corrector:
    """Corrects the sites that add most, one at a time, on every batch.

    The sites are chosen on the first batch, since data is read once: those with the largest share
    of codes that differ on the same inputs.

    Args:
        converted: A copy of the converted graph.
        count: How many sites to correct.
    """

    def __init__(self, converted: fx.GraphModule, count: int) -> None:
        self._model, self._count = converted, count
        self._sites: dict[str, tuple[Probing, Probe]] = {}
        self._after: dict[str, dict[str, Sums]] | None = None

    def add(self, probing: Probing, probe: Probe) -> None:
        """Get to know a site while the shadows are woven in."""
        assert probing.shadow is not None  # to correct a site is to put its value there
        self._sites[probe.name] = probing, probe

    def start(self) -> None:
        """Let the probes of the last sites keep the prepared codes of a batch."""
        read = {name for probing, _ in self._sites.values() for name in probing.inputs}
        self._ends = {n: s for n, s in self._sites.items() if s[0].node not in read}
        for _, probe in self._ends.values():
            probe.keep = True

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], start: Any) -> None:
        """Run the batch that the twin graph has just seen, with one site after the other corrected.

        Args:
            args: The batch, as positional arguments.
            kwargs: The batch, as keywords.
            start: The random state that the twin graph started from.
        """
        if self._after is None:
            names = {probing.node: probe.grid for probing, probe in self._ends.values()}
            self._after = {c: {n: Sums(g) for n, g in names.items()} for c in self._chosen()}
        state = _rng.rng_state()
        for name in self._after:
            _rng.set_rng_state(start)
            found = _Corrected(self._model, self._sites[name][0], self._ends, self._after[name])
            with as_given(model=True):
                found.run(*self._inputs(args, kwargs))
        _rng.set_rng_state(state)
        for _, probe in self._ends.values():
            probe.kept = None

    def _chosen(self) -> list[str]:
        shares = {
            name: probe.local.differing / max(probe.local.elements, 1)
            for name, (_, probe) in self._sites.items()
            if probe.local is not None
        }
        worst = sorted((n for n in shares if shares[n]), key=lambda n: -shares[n])
        return worst[: self._count]

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        names = [str(n.target) for n in self._model.graph.nodes if n.op == "placeholder"]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        held = [given[name] for name in names if name in given]
        copies: list[Any] = _torch.tree_map_tensors(Tensor.clone, held)
        return copies

    def results(self) -> tuple[Culprit, ...]:
        """The corrected sites, those first whose correction takes most noise from the end."""
        before = sum((probe.cumulative for _, probe in self._ends.values()), Discrepancy())
        found = [
            Culprit(name, before, sum((s.discrepancy for s in after.values()), Discrepancy()))
            for name, after in (self._after or {}).items()
        ]
        return tuple(sorted(found, key=lambda c: c.after.noise))


class _Corrected(fx.Interpreter):
    """Runs the converted graph with one site corrected, and compares the last sites."""

    def __init__(
        self,
        model: fx.GraphModule,
        probing: Probing,
        ends: Mapping[str, tuple[Probing, Probe]],
        sums: Mapping[str, Sums],
    ) -> None:
        super().__init__(model)
        assert probing.shadow is not None  # see Corrector.add
        self._probing, self._shadow = probing, probing.shadow
        self._ends = {other.node: (other, probe) for other, probe in ends.values()}
        self._given: dict[str, Any] = {}
        self._floats: Tensor | None = None
        self._sums = sums  # the last sites against the prepared model's own codes

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; note what the site needs, correct it, and compare the last sites."""
        value = super().run_node(n)
        here, floats = self._probing.node, self._floats
        behind = floats is not None and here in {x.name for x in n.all_input_nodes}
        if behind and isinstance(value, Tensor) and value.is_floating_point():
            return floats  # in place of what a decomposed dequantize makes of its own grid
        for index, name in enumerate(self._probing.inputs):
            if n.name == name:
                source = self._shadow.sources[index]
                self._given[name] = source[0](value) if source is not None else value
        if n.name == here:
            value = self._correct(value)
        elif n.name in self._ends:
            probing, _ = self._ends[n.name]
            codes = probing.converted(value)
            self._compare(n.name, codes, probing.converted.qparams)
        return value

    def _correct(self, value: Tensor) -> Tensor:
        shadow = self._shadow
        given = [self._given[name] for name in self._probing.inputs]
        codes, grid = shadow(*given).expected, shadow.qparams
        if self._probing.node in self._ends:
            self._compare(self._probing.node, codes, grid)
        if value.is_quantized:
            return _torch.requantized(value, codes, grid.scales[0], int(grid.zero_points[0]))
        if value.is_floating_point():
            return dequantize(codes, grid)
        self._floats = dequantize(codes, grid)  # for the dequantize that comes next
        target = self._probing.converted.qparams
        return regrid(codes, grid, target).clamp(*target.container).to(value.dtype)

    def _compare(self, name: str, codes: Tensor, grid: QParams) -> None:
        probe = self._ends[name][1]
        assert isinstance(probe.kept, torch.Tensor)  # start() told it to keep them
        self._sums[name].compare(probe.kept, codes, grid)
