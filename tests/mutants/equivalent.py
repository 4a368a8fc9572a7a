"""Mutants that no test can notice: they compute the same. Each with the reason."""

from __future__ import annotations

__all__ = ["EQUIVALENT"]

_ONE = "without an axis there is one scale and one zero point: [0] and [-1] are the same"

# (module, line, the line with the token changed): why nothing differs
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "fxqfix/routes/_lapses.py",
        "return self.grid.scales[0]",
        "return self.grid.scales[ -1]",
    ): _ONE,
    (
        "fxqfix/routes/_lapses.py",
        "point = int(found.grid.zero_points[0])",
        "point = int(found.grid.zero_points[ -1])",
    ): _ONE,
}
