"""Values that an in-place op overwrites before they are read: conversion goes by dataflow."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fxqfix import ops
from fxqfix.checks._base import Check, Finding, Subject
from fxqfix.dialects._writes import overwrites

__all__ = ["CHECKS"]


def _lost(subject: Subject) -> Iterator[Finding]:
    for use in overwrites(subject.graph_module.graph, subject.modules):
        found = ops.match_node(use.op, subject.modules)
        key = found.key if found is not None else str(use.op.target)
        kept = found is not None and found.spec.inplace and not subject.exported
        if kept or key == "dropout":
            continue
        yield Finding(
            "inplace-lost",
            "error" if _quantizes(subject, use.op) else "warning",
            use.op.name,
            f"{key} writes {use.value.name} in place; {use.reader.name} reads it later and gets, "
            "once converted, what was there before",
            "convert fxqfix.freeze(prepared), or with fxqfix.to_int8: there the reader takes the "
            "op's result; or write the op without inplace",
        )


def _quantizes(subject: Subject, op: fx.Node) -> bool:
    """Whether a site stands right behind an op, so that its kernel writes a tensor of its own."""
    return any(user in subject.taps for user in op.users)


PLACE = 30
CHECKS = (Check("inplace-lost", "values that are read after an op overwrote them", _lost),)
