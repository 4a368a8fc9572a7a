"""What a deviation is: a row that says what an engine does otherwise, in fields of a recipe.

A recipe says how one op is computed; in a plain `Recipe()` everything is as the reference has it.
A deviation changes fields. Two deviations that change different fields can be had together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxqfix.deviations._subject import Subject

__all__ = ["DUE", "Change", "Deviation", "Recipe", "problem"]

DUE = "due"


@dataclass(frozen=True)
class Recipe:
    """How one op is computed; "due" is the reference's own way.

    Attributes:
        x: How the activations lie: "nchw-as-nhwc", ...
        cast: The container that input codes are taken for: "int8" or "uint8".
        x_shift: What is added to input codes.
        x_point: "none": the input's zero point is not taken off; "none-0", "none-1": of one input.
        pad: "zero": padding holds code 0; "point": the zero point, which is not taken off.
        w: How the weight lies: "ihwo", "flipped", ...; "op:NAME" is another op's,
            "solved" is what the device's own codes follow from.
        w_point: "none": the weight's zero point is not taken off.
        overflow: "wrap-16", "clamp-24" of sums; with "-bias", of sums with the bias;
            "steps-16-ohwi": after each product, in the order of such a weight.
        pairs: Which pairs of products saturate at 16 bits: "none", "flat", "channel", "halves".
        bias: "none", "int32", "truncated", ...
        engine: Whose arithmetic it is.
        multiplier: "f32", "f64", "q31", ...
        channels: Which channel's scale is whose: "first", "rolled", ...
        shift: Bits by which the multiplier is too large.
        rounding: "even", "up", "away", "zero" or "floor".
        y_point: "none": the output's zero point is left out.
        relu: "none", "zero" (at code 0) or "added".
        clamp: "container", "declared" or "wrap".
        y_shift: What is added to the result's codes.
        y: How the result lies; "bytes": its bytes were read as the other dtype of 8 bits.
        scale: Which other scale quantizes.
        divide: "true", "f64": how an input is brought to steps of the grid.
        average: What averages are divided by.
        table: Codes by which a table is off.
        mix: How two inputs are brought to one grid.
        order: "any": float32 sums in another order.
    """

    x: str = DUE
    cast: str = DUE
    x_shift: int = 0
    x_point: str = DUE
    pad: str = DUE
    w: str = DUE
    w_point: str = DUE
    overflow: str = DUE
    pairs: str = DUE
    bias: str = DUE
    engine: str = DUE
    multiplier: str = DUE
    channels: str = DUE
    shift: int = 0
    rounding: str = DUE
    y_point: str = DUE
    relu: str = DUE
    clamp: str = DUE
    y_shift: int = 0
    y: str = DUE
    scale: str = DUE
    divide: str = DUE
    average: str = DUE
    table: int = 0
    mix: str = DUE
    order: str = DUE

    def key(self, names: Iterable[str]) -> tuple[Any, ...]:
        """The values of some fields."""
        return tuple(getattr(self, name) for name in names)


FIELDS = frozenset(f.name for f in fields(Recipe))
Change = Mapping[str, Any]
Variants = tuple[Change, ...] | Callable[["Subject"], Iterable[Change]]


@dataclass(frozen=True)
class Deviation:
    """One way in which an engine computes an op otherwise.

    Attributes:
        name: In kebab-case.
        summary: What the engine does, in one sentence without its subject: "rounds halves up".
        remedy: What to change in the engine.
        variants: The changes of a recipe that it can be, or what gives them for an op.
        needs: What an input must have to tell it from others; "" for nothing special.
        last: Whether it is tried only where nothing else alone gives every code.

    Example:
        >>> row = Deviation("half-up", "rounds halves up", "round to even", ({"rounding": "up"},))
        >>> row.variants[0]
        {'rounding': 'up'}
    """

    name: str
    summary: str
    remedy: str
    variants: Variants
    needs: str = ""
    last: bool = False

    def changes(self, subject: Subject) -> tuple[Change, ...]:
        """The variants that mean something for an op."""
        found = self.variants(subject) if callable(self.variants) else self.variants
        return tuple(change for change in found if change.keys() <= subject.handles)


def changed(recipe: Recipe, change: Change) -> Recipe | None:
    """A recipe with one more change; None where a field is changed already."""
    if any(getattr(recipe, name) != getattr(_PLAIN, name) for name in change):
        return None
    return replace(recipe, **change)


_PLAIN = Recipe()


def problem(row: Deviation) -> str | None:
    """What is wrong with a row; None where nothing is."""
    if not row.name or row.name != "-".join(row.name.lower().split()):
        return "a deviation's name is in kebab-case"
    for change in () if callable(row.variants) else row.variants:
        if unknown := sorted(change.keys() - FIELDS):
            return f"it changes what no recipe has: {', '.join(unknown)}"
        if changed(_PLAIN, change) in (None, _PLAIN):
            return f"a variant changes nothing: {dict(change)}"
    return None
