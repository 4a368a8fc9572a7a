"""Sums that leave their accumulator."""

from __future__ import annotations

from fxqfix.deviations._base import Change, Deviation
from fxqfix.deviations._subject import Subject

__all__ = ["DEVIATIONS"]


def _bits(kind: str, *bits: int) -> tuple[Change, ...]:
    return tuple({"overflow": f"{kind}-{b}{e}"} for b in bits for e in ("", "-bias"))


def _pairs(subject: Subject) -> tuple[Change, ...]:
    orders = ("flat", "channel", "halves", "none")
    own = getattr(getattr(subject, "sums", None), "order", "")
    return tuple({"pairs": order} for order in orders if order != (own or "none"))


PLACE = 50
DEVIATIONS = (
    Deviation(
        "accumulator-wraps",
        "has sums that wrap around at 16, 24 or 32 bits",
        "add in 32 bits or more",
        _bits("wrap", 16, 24, 32),
        "large sums",
    ),
    Deviation(
        "accumulator-saturates",
        "has sums that saturate at 16, 24 or 32 bits",
        "add in 32 bits or more",
        _bits("clamp", 16, 24, 32),
        "large sums",
    ),
    Deviation(
        "adds-saturate",
        "saturates at 16, 24 or 32 bits after each product",
        "add in 32 bits or more",
        tuple(
            {"overflow": f"steps-{b}-{order}"} for b in (16, 24, 32) for order in ("ohwi", "oihw")
        ),
        "large sums of both signs",
        last=True,
    ),
    Deviation(
        "pairs-saturate",
        "adds pairs of products at 16 bits otherwise than the reference (as vpmaddubsw does)",
        "add products in 32 bits, or take weights of 7 bits",
        _pairs,
        "large codes beside large weights of one sign",
    ),
)
