"""What a cause is: a correction to one node alone, and the codes that then agree.

Causes are asked in the registry's order; each explains some of the codes that no cause before it
explained. A code that only two corrections together repair goes to the later one. `upstream` and
`unexplained` come last and take the rest, so that the shares add up to all differing codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxqfix.errors import FxqfixError, in_brief
from fxqfix.evidence.view import View

__all__ = ["NOT_ATTRIBUTED", "Attribution", "Cause", "attribute"]

# Where causes stand in a row: codes of batches that no cause was asked about.
NOT_ATTRIBUTED = "not-attributed"


@dataclass(frozen=True)
class Cause:
    """One cause, by its registry row.

    Attributes:
        name: Kebab-case name, as in reports.
        summary: One sentence: what goes wrong.
        repair: Name of the pass (or function) that repairs it, "" where none can.
        advice: What to do, in one sentence.
        local: Whether it explains only codes that differ on the same inputs.
        inherits: Whether codes are its own that differ from the prepared model's alone, where no
            other cause can explain such codes.

    Example:
        >>> from fxqfix.causes import registry
        >>> next(cause.repair for cause in registry() if cause.name == "range-lost")
        'restore-range'
    """

    name: str
    summary: str
    repair: str
    advice: str
    local: bool = True
    inherits: bool = False

    def claims(self, view: View) -> Tensor | None:
        """Mask of the codes that are this cause's, whatever else explains them; mostly None."""
        return None

    def explains(self, view: View) -> Tensor | None:
        """Mask of the codes that agree once this cause is corrected; None where it can't act."""
        raise TypeError(f"{type(self).__name__} has no counterfactual")

    def evidence(self, view: View) -> str:
        """The numbers that the cause rests on at this site, as a short sentence."""
        return ""


@dataclass
class Attribution:
    """Codes per cause of one site, added up over batches.

    Attributes:
        counts: Cause name -> codes.
        evidence: Cause name -> evidence, from the first batch that shows it.
        problems: What could not be computed at this site, each once.
    """

    counts: dict[str, int] = field(default_factory=dict)
    evidence: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def attribute(view: View, causes: Sequence[Cause], into: Attribution) -> None:
    """Share out a site's differing codes among the causes, in their order.

    Args:
        view: The site on one batch.
        causes: The causes to ask, in order; the last one has to take everything.
        into: Where the counts are added.
    """
    left = int(torch.count_nonzero(view.left))
    asked = [(c, c.claims, False) for c in causes] + [(c, c.explains, c.inherits) for c in causes]
    for cause, question, inherits in asked:
        count = view.inherited if inherits else 0
        if left:
            mine = _mine(cause, question, view, into)
            own = int(torch.count_nonzero(mine)) if mine is not None else 0
            count += own
        if count:
            into.counts[cause.name] = into.counts.get(cause.name, 0) + count
            into.evidence.setdefault(cause.name, cause.evidence(view))
        if left and mine is not None and own:
            view.left = view.left & ~mine
            left -= own


def _mine(
    cause: Cause, question: Callable[[View], Tensor | None], view: View, into: Attribution
) -> Tensor | None:
    """Mask of the codes that a cause takes of those that are left."""
    mask = _ask(cause, question, view)
    if view.problem and view.problem not in into.problems:
        into.problems.append(view.problem)
    if mask is None:
        return None
    mine = mask & view.left
    return mine & view.differs_locally if cause.local else mine


def _ask(cause: Cause, question: Callable[[View], Tensor | None], view: View) -> Tensor | None:
    """A cause that can't be computed for an op says so in the row; the comparison goes on."""
    try:
        return question(view)
    except FxqfixError:
        raise
    except Exception as error:  # user modules run inside; any kind of error can come back
        view.problem = f"{cause.name} could not be computed here: {in_brief(error)}"
        return None
