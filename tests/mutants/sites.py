"""Mutants of a module: one token changed, by the operators of cosmic-ray.

A comparison is weakened, tightened or reversed, `and` and `or` change places, a `not` or a minus
goes, plus and minus change places, an integer becomes its neighbour. Messages (f-strings, what is
raised, strings put together), docstrings and the numbers of an order (`PLACE`) are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators import (
    binary_operator_replacement,
    boolean_replacer,
    comparison_operator_replacement,
    number_replacer,
    unary_operator_replacement,
)
from cosmic_ray.operators.operator import Operator

__all__ = ["Mutant", "mutants"]


class _Membership(Operator):  # type: ignore[misc]  # cosmic-ray has no types
    """`in` and `not in`, which cosmic-ray leaves alone."""

    swap = {"in": "not in", "not in": "in"}  # noqa: RUF012  # never written to

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "comparison":
            for op in node.children[1::2]:
                if " ".join(op.get_code().split()) in self.swap:
                    yield op.start_pos, op.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        at = [
            i
            for i, op in enumerate(node.children)
            if i % 2 and " ".join(op.get_code().split()) in self.swap
        ][index]
        new = self.swap[" ".join(node.children[at].get_code().split())]
        node.children[at] = parso.parse(f" {new}")
        return node

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return ()


_COMPARISONS = (
    ("Eq", "NotEq"), ("NotEq", "Eq"), ("Is", "IsNot"), ("IsNot", "Is"),
    ("Lt", "LtE"), ("Lt", "GtE"), ("LtE", "Lt"), ("LtE", "Gt"),
    ("Gt", "GtE"), ("Gt", "LtE"), ("GtE", "Gt"), ("GtE", "Lt"),
)  # fmt: skip
_OPERATORS: tuple[Any, ...] = (
    *(
        getattr(comparison_operator_replacement, f"ReplaceComparisonOperator_{a}_{b}")
        for a, b in _COMPARISONS
    ),
    _Membership,
    boolean_replacer.ReplaceAndWithOr,
    boolean_replacer.ReplaceOrWithAnd,
    unary_operator_replacement.ReplaceUnaryOperator_Delete_Not,
    unary_operator_replacement.ReplaceUnaryOperator_Delete_USub,
    binary_operator_replacement.ReplaceBinaryOperator_Add_Sub,
    binary_operator_replacement.ReplaceBinaryOperator_Sub_Add,
    number_replacer.NumberReplacer,
)


@dataclass(frozen=True)
class Mutant:
    """A module with one token changed.

    Attributes:
        path: The module's file, from the root of the repository.
        token: Where the token begins: line, from 1, and column. Mutants of one token share it.
        operator: Class of cosmic-ray.
        occurrence: Which of the places that the operator changes.
    """

    path: str
    token: tuple[int, int]
    operator: Any
    occurrence: int

    @property
    def line(self) -> int:
        return self.token[0]

    def source(self, root: Path) -> str:
        """The changed module."""
        changed = mutate_code(
            (root / self.path).read_text(encoding="utf-8"), self.operator(), self.occurrence
        )
        assert changed is not None, self
        return changed

    def change(self, root: Path) -> tuple[str, str]:
        """The line before and after."""
        before = (root / self.path).read_text(encoding="utf-8").splitlines()
        after = self.source(root).splitlines()
        return before[self.line - 1].strip(), " ".join(after[self.line - 1].split())


def mutants(path: str, root: Path) -> list[list[Mutant]]:
    """All mutants of a module, a list for each token."""
    found: dict[tuple[int, int], list[Mutant]] = {}
    counts = dict.fromkeys(_OPERATORS, 0)
    made = {operator: operator() for operator in _OPERATORS}
    for node in ast_nodes(get_ast((root / path).read_text(encoding="utf-8"))):
        for operator in _OPERATORS:
            for token, _ in made[operator].mutation_positions(node):
                if not any(skips(node) for skips in (_is_message, _is_fraction, _is_place)):
                    mutant = Mutant(path, token, operator, counts[operator])
                    found.setdefault(token, []).append(mutant)
                counts[operator] += 1
    return [found[token] for token in sorted(found)]


def _is_fraction(node: Any) -> bool:
    return node.type == "number" and not isinstance(_value(node.value), int)


def _is_place(node: Any) -> bool:
    """Whether it is a number of an order, whose neighbour is the same order."""
    stmt = node.parent
    return stmt.type == "expr_stmt" and getattr(stmt.children[0], "value", "") == "PLACE"


def _value(text: str) -> Any:
    return complex(text) if text.endswith("j") else eval(text)


def _is_message(node: Any) -> bool:
    texts = {"string", "fstring", "strings"}
    if node.type == "operator" and any(n.type in texts for n in node.parent.children):
        return True
    while node is not None:
        if node.type in ("fstring", "raise_stmt"):
            return True
        node = node.parent
    return False
