"""Why codes differ: one cause per file, asked in the order of their `PLACE`.

The order matters, because a code counts for the first cause that explains it:

1. what touches few codes and says most: codes out of range, overwritten values, train mode,
   folding, an op that stays in float, the fractions of zero points, a bias that the kernel rounds,
   ties;
2. other qparams: no rule at all (`uncalibrated`), another site's or the kernel's own, an older
   range's, another rule's for the same range, what an observer moved from there, none that the
   prepared model gives; and last, on all
   of these qparams, other values of weights and biases. These add up: each corrects what those
   before it do too (`not-lowered` included), and what two of them need together goes to the later
   one;
3. the engine's own arithmetic, judged with all of these corrected;
4. codes that agree on the same inputs: those that the prepared model has from computing in float
   right here, and then `upstream`, which is the rest of them;
5. `unexplained`: everything that is left.
"""

from __future__ import annotations

from fxqfix.causes._base import NOT_ATTRIBUTED, Attribution, Cause, attribute
from fxqfix.evidence.emulated import Emulated
from fxqfix.evidence.found import Found
from fxqfix.evidence.recompute import Recompute
from fxqfix.evidence.steps import Held
from fxqfix.evidence.view import View
from fxqfix.evidence.weights import WeightPair
from fxqfix.registry import Registry

__all__ = [
    "NOT_ATTRIBUTED",
    "Attribution",
    "Cause",
    "Emulated",
    "Found",
    "Held",
    "Recompute",
    "View",
    "WeightPair",
    "attribute",
    "registry",
]

CAUSES: Registry[str, Cause] = Registry("cause", parts=("summary", "advice"))
CAUSES.discover(__name__, "CAUSE")


def registry() -> tuple[Cause, ...]:
    """All causes in the order in which they are asked.

    Example:
        >>> from fxqfix.causes import registry
        >>> [cause.name for cause in registry()][-2:]
        ['upstream', 'unexplained']
    """
    return tuple(CAUSES.values())
