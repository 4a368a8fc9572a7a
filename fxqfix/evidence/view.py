"""What a cause gets to see of one site on one batch, and the recomputations it may ask for.

It sees the places where codes differ, and a sample of the others: all values here are 1-d, of these
places. Recomputations run only where codes differ, in float64 and on copies that are dropped at
once, so that a model without discrepancies pays nothing and memory stays flat.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fxqfix.dialects import Site
from fxqfix.dialects.weights import WeightView
from fxqfix.engines import Defect
from fxqfix.errors import in_brief
from fxqfix.evidence.emulated import Emulated
from fxqfix.evidence.found import BEYOND, MOST, Found, roundings
from fxqfix.evidence.places import Places
from fxqfix.evidence.recompute import Reads, Recompute
from fxqfix.evidence.steps import Held, Step, explain, relabelled
from fxqfix.evidence.weights import WeightPair
from fxqfix.pairing import Pair
from fxqfix.passes._shadow_modules import Local
from fxqfix.qparams import QParams

__all__ = ["View"]


@dataclass
class View:
    """One site on one batch: every tensor holds the values at `places`.

    Attributes:
        pair: The prepared and the converted site.
        found: All codes.
        places: Those that are looked at.
        differs_locally: Mask of the codes that differ with the same inputs.
        differs: Mask of the codes that differ from the prepared model's own.
        local: The shadow's record; None for weights.
        recompute: Recomputations; None for weights.
        weight: For a weight site, the prepared weight and the converted one.
        defect: The known-wrong kernel that the converted op runs on, or None.
        between: Whether that kernel runs between this site and the ones before it.
        emulated: The converted op in its engine's integers; None where it has none.
        garbled: Of a weight that its engine packs but can't unpack: whether these are no codes.
        held: What a prepared quantizer holds: that of a weight by its module's path, the site's own
            by "".
        picked: Why the converted grid is not this site's quantizer's choice, "" where it is.
        loose: By node: sites that this one is computed from and that the prepared model leaves in
            float.
        unseen: What this one is computed from and no row shows: nested graphs, dynamic ops.
        inherited: How many codes beside those looked at differ from the prepared model's own.
        steps: From grid to grid, those that an earlier batch asked for; more are added.
        left: Mask of the codes that no cause before the present one explained.
        problem: Why the last recomputation that failed did, "" where none did.
    """

    pair: Pair
    found: Found
    places: Places
    differs_locally: Tensor
    differs: Tensor
    local: Local | None = None
    recompute: Recompute | None = None
    weight: WeightPair | None = None
    defect: Defect | None = None
    between: bool = False
    emulated: Emulated | None = None
    garbled: bool = False
    held: Callable[[str], Held | None] = field(default=lambda _: None)
    picked: str = ""
    loose: Mapping[str, Site] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    inherited: int = 0
    steps: dict[Any, tuple[Step, ...]] = field(default_factory=dict)
    _corrected: set[str] = field(default_factory=set, init=False)
    _quantized: set[str] = field(default_factory=set, init=False)
    _sums: dict[Any, Any] = field(default_factory=dict, init=False)
    _values: dict[Any, tuple[Tensor | None, Any]] = field(default_factory=dict, init=False)
    left: Tensor = field(init=False)
    problem: str = field(default="", init=False)

    def __post_init__(self) -> None:
        """All differing codes are left to explain."""
        self.left = self.differs_locally | self.differs

    @classmethod
    def of(cls, pair: Pair, found: Found, *, inherited: bool = True, **known: Any) -> View:
        """Look at the codes that differ.

        Args:
            pair: The two sites.
            found: Their codes.
            inherited: Whether to look at those too that differ from the model's own alone.
            known: The other attributes.
        """
        here, there = found.masks()
        if not inherited:
            known["inherited"] = int(torch.count_nonzero(there.logical_and_(~here)))
        places = Places.of((here | there) if inherited else here.clone())
        local = places.take(here)
        return cls(pair, found, places, local, places.take(there) if inherited else local, **known)

    @property
    def grid(self) -> QParams:
        """The prepared qparams."""
        return self.found.grid

    @property
    def target(self) -> QParams:
        """The converted qparams."""
        return self.found.target

    @cached_property
    def value(self) -> Tensor:
        """The value before quantization that the prepared op gives, float32."""
        return self.places.take(self.found.value)

    @cached_property
    def expected(self) -> Tensor:
        """The prepared op's codes, int32 on `grid`."""
        return self.places.take(self.found.expected).to(torch.int32)

    @cached_property
    def raw(self) -> Tensor:
        """The converted model's codes on its own grid."""
        return self.places.take(self.found.raw)

    @cached_property
    def actual(self) -> Tensor:
        """The converted model's codes on the prepared grid, int32."""
        return self.places.regrid(self.raw, self.target, self.grid)

    @cached_property
    def exact(self) -> Tensor:
        """The site's value in float64 with the prepared weights."""
        return self.recomputed({path: p.mine for path, p in self.weights.items()})

    @cached_property
    def converted(self) -> Tensor:
        """The site's value in float64 with the converted weights."""
        return self.recomputed({path: p.theirs for path, p in self.weights.items()})

    @cached_property
    def otherwise_rounded(self) -> Tensor | None:
        """Like `exact`, with weight codes that round the same values otherwise; None if none do."""
        if all(p.otherwise_rounded is p.mine for p in self.weights.values()):
            return None
        return self.recomputed({path: p.otherwise_rounded for path, p in self.weights.items()})

    @property
    def weights(self) -> Mapping[str, WeightPair]:
        """The site's own weights, by path."""
        return self.recompute.own_weights if self.recompute is not None else {}

    @cached_property
    def requantized(self) -> Tensor | None:
        """Like `converted`, quantized in between where the converted model is; None if nowhere."""
        if self.recompute is None or not self.recompute.own_inner:
            return None
        return self.recomputed({path: p.theirs for path, p in self.weights.items()}, inner=True)

    @cached_property
    def _integers(self) -> Tensor | None:
        """The codes that the engine's integers give from the converted model's own inputs."""
        if self.emulated is None or self.local is None:
            return None
        found, why = self.emulated.codes(self.local), self.emulated.refused
        if found is None and why:
            self.problem = f"no cause in the engine's arithmetic looked for: {why}"
        return None if found is None else self.places.take(found)

    @cached_property
    def miscomputed(self) -> Tensor:
        """Mask of the codes that are not what the op makes of the converted integers.

        By the engine's integers as they should be; by float64 where these are not known.
        """
        if self._integers is not None:
            return self._integers != self.raw
        return ~self.agrees(self.converted, self.target, self.raw)

    def owed_to(self, effect: str = "") -> Tensor | None:
        """Codes that the engine's integers give, and without one of its effects don't.

        Args:
            effect: Name of the effect's cause; "" for all codes that the engine's integers give.

        Returns:
            The mask; None where the engine has no exact arithmetic for the op, or no such effect.
        """
        if self.emulated is None or self.local is None:
            return None  # nor has a float op
        if effect and not self.emulated.has(effect) and not self.emulated.is_new(self.local):
            return None
        if self._integers is None:
            return None
        mine = self._integers == self.raw
        if not effect:
            return mine
        without = self._without(effect)
        return mine & (without != self.raw) if without is not None else None

    def _without(self, effect: str) -> Tensor | None:
        """The engine's codes without one of its effects."""
        assert self.emulated is not None
        assert self.local is not None
        if effect not in self._values:
            found = self.emulated.codes(self.local, without=effect)
            self._values[effect] = None if found is None else self.places.take(found), None
        return self._values[effect][0]

    @cached_property
    def _unbiased(self) -> Tensor:
        found = self.owed_to("bias-int32")
        without = self._without("bias-int32") if found is not None else None
        if found is None or without is None:
            return self.raw
        return torch.where(found, without, self.raw)

    def unbiased(self, grid: QParams) -> Tensor:
        """The converted codes on a grid, as they are where the kernel doesn't round the bias."""
        if self._unbiased is self.raw and grid.same_grid(self.grid):
            return self.actual
        return self.places.regrid(self._unbiased, self.target, grid)

    def recomputed(self, weights: Mapping[str, WeightView], **options: Any) -> Tensor:
        """The site's value in float64 with these weights; the float32 value where that fails."""
        if self.recompute is None or self.local is None:
            return self.value.double()
        named = {name: option for name, option in options.items() if option}
        key = tuple((path, id(w)) for path, w in weights.items()), tuple(named.items())
        if key in self._values and (known := self._values[key][0]) is not None:
            return known
        try:
            found = self.recompute.at(self.places, self.local, weights, self._sums, **named)
            self._values[key] = found, weights  # which keeps the weights, whose ids these are
            return found
        except (RuntimeError, TypeError, AttributeError) as error:
            # A user's module may not run in float64; the cause then works on float32 values.
            if self.unseen:
                return self.value.double()
            self.problem = f"no float64 recomputation: {in_brief(error)}"
            return self.value.double()

    @cached_property
    def folded(self) -> Tensor | None:
        """The codes in float32 with BatchNorm folded; None where there is none to fold."""
        if self.recompute is None or self.local is None:
            return None
        if not any(p.mine.folded for p in self.weights.values()):
            return None
        value = self.recompute.folded(self.local)
        return self.places.quantize(self.places.take(value), self.grid)

    @cached_property
    def all_steps(self) -> tuple[tuple[str, QParams, tuple[Step, ...]], ...]:
        """(site, prepared qparams, steps to the converted ones) of the output and the weights."""
        inputs = [pair[1] for pair in self.local.codes if pair is not None] if self.local else []
        own = self._steps_of("", self.grid, self.target, inputs)
        found = [(self.pair.prepared.site.name, self.grid, own)]
        for path, p in self.weights.items():
            grids = p.mine.qparams, p.theirs.qparams
            steps = relabelled(grids[1]) if p.relabelled else self._steps_of(path, *grids, ())
            found.append((f"{path}.weight", p.mine.qparams, steps))
        return tuple(found)

    def _steps_of(
        self, path: str, mine: QParams, theirs: QParams, inputs: Sequence[QParams]
    ) -> tuple[Step, ...]:
        key = path or (mine, theirs)  # a weight has its grids for good
        if key not in self.steps:
            self.steps[key] = self._explained(path, mine, theirs, inputs)
        return self.steps[key]

    def _explained(
        self, path: str, mine: QParams, theirs: QParams, inputs: Sequence[QParams]
    ) -> tuple[Step, ...]:
        if mine.same_grid(theirs):
            return ()
        nothing = Held(mine, None, None, None, "the prepared model", False, True, False)
        found = self.held(path) or nothing
        picked = "" if path else self.picked
        return explain(replace(found, used=mine, picked=picked), theirs, inputs)

    def corrected_by(self, cause: str) -> Tensor:
        """Mask of the codes that agree once this cause is corrected, and those corrected before.

        The prepared op, in float where the converted model is, with the qparams of its output and
        of its weights that the steps of these causes lead to.
        """
        self._corrected.add(cause)
        value, grid = self._stepped()
        found = self.agrees(value, grid, self.unbiased(grid))
        others = self._with_other_values
        if others and "other-weights" not in self._corrected:
            # Both ways round, or what two differences make together would be put on the first.
            back = {path: others.get(path, p.mine) for path, p in self.weights.items()}
            found = found & self.agrees(self.recomputed(back), self.grid, self.expected)
        return found

    @cached_property
    def _with_other_values(self) -> dict[str, WeightView]:
        """The prepared weights with the converted model's values on their own grids."""
        step = min(self.target.scales)
        return {path: p.swapped for path, p in self.weights.items() if p.differs(step)}

    def blocked(self) -> Tensor | None:
        """Mask of the codes that agree once weights by block are quantized; None without any.

        On top of all that was corrected before.
        """
        if self.recompute is None or not self.recompute.own_blocks:
            return None
        value, grid = self._stepped(blocks=True)
        return self.agrees(value, grid, self.unbiased(grid))

    def _stepped(self, *, blocks: bool = False) -> tuple[Tensor, QParams]:
        (_, _, own), *others = self.all_steps
        weights, step = {}, min(self.target.scales)
        for (path, p), (_, _, steps) in zip(self.weights.items(), others, strict=True):
            done = self._done(steps)
            grid = done[-1].reached if done else p.mine.qparams
            grid = p.theirs.qparams if len(done) == len(steps) else grid
            weights[path] = p.settled(grid, step, self._corrected)
        done = self._done(own)
        grid = self.grid if not done else done[-1].reached
        left, theirs = (name in self._corrected for name in ("not-lowered", "other-weights"))
        value = self.recomputed(weights, floats=left, blocks=blocks, others=theirs)
        return value, self.target if len(done) == len(own) else grid

    def _done(self, steps: Sequence[Step]) -> list[Step]:
        return list(itertools.takewhile(lambda step: step.cause in self._corrected, steps))

    def once_quantized(self, nodes: Collection[str]) -> Tensor | None:
        """Mask of the codes that agree once these are quantized, and those quantized before.

        Args:
            nodes: Some of `loose`. Codes that differ on the same inputs are left alone.
        """
        if self.local is None or self.local.settle is None:
            return None
        self._quantized.update(nodes)
        codes = self.places.take(self.local.settle(self._quantized))
        return self.differs & ~self.differs_locally & (codes == self.actual)

    def agrees_reading(self, reads: Reads) -> Tensor:
        """Mask of the codes that agree where an op reads this in place of what was overwritten.

        On the prepared qparams, or on all of the converted ones and in their range: the causes
        that tell which of these moved don't know what was overwritten.
        """
        theirs = {path: p.theirs for path, p in self.weights.items()}
        found = self.agrees(self.recomputed(theirs, reads=reads), self.target, self.raw)
        if self.weights_differ or not self.grid.same_grid(self.target):
            mine = {path: p.mine for path, p in self.weights.items()}
            found |= self.agrees(self.recomputed(mine, reads=reads), self.grid, self.actual)
        return found

    @cached_property
    def weights_differ(self) -> bool:
        """Whether a weight that this site uses has other qparams than in the prepared model."""
        return any(not p.same_grid for p in self.weights.values())

    def agrees(
        self, value: Tensor, qparams: QParams, codes: Tensor, *, reach: float = 1.0
    ) -> Tensor:
        """Mask of the codes that are a rounding of `value`, within float32 arithmetic.

        The width is what float32 rounding can do to the value: a few roundings of its largest
        term, and the shadow's own measured deviation from float64.

        Args:
            value: Exact values, float64.
            qparams: The grid and range to quantize on.
            codes: The codes to judge, on that grid.
            reach: How many times the shadow's own deviation is allowed.
        """
        scale, point = self.places.grid(qparams)
        reach *= 1.0 if self.places.everywhere else BEYOND
        error = (self.own_error * reach / scale).clamp(max=MOST)
        low, high = roundings(value / scale, point, error, self._bias(scale))
        low, high = (t.clamp_(qparams.quant_min, qparams.quant_max) for t in (low, high))
        return (codes >= low) & (codes <= high)

    @cached_property
    def own_error(self) -> Tensor:
        """How far the shadow's float32 values are from float64."""
        return (self.value.double() - self.exact).abs().max()

    def _bias(self, scale: Tensor) -> float | Tensor:
        biases = [p.mine.bias for p in self.weights.values() if p.mine.bias is not None]
        return max((float(b.detach().abs().max()) for b in biases), default=0.0) / scale
