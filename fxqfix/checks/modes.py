"""Train mode and randomness: what the forward does and the converted model will not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fxqfix import _torch
from fxqfix.checks._base import Check, Finding, Subject
from fxqfix.checks._draws import drawing
from fxqfix.dialects._modes import trains

__all__ = ["CHECKS"]

_TRACED = "trace in eval mode, or use the module (nn.Dropout, nn.BatchNorm2d)"
_PT2E = "torchao.quantization.pt2e.move_exported_model_to_eval(prepared)"


def _in_train_mode(subject: Subject, code: str, kind: Any, what: str) -> Iterator[Finding]:
    if subject.training:
        return
    for path, module in subject.modules.items():
        if isinstance(module, kind) and module.training:
            yield Finding(
                code,
                "error",
                path,
                f"{type(module).__name__} is in train mode in a model in eval mode: {what}",
                "prepared.eval()",
            )


def _traced_in(subject: Subject, code: str, word: str) -> Iterator[Finding]:
    """Functions that a trace in train mode called with training=True: eval() can't reach them."""
    for node in subject.graph_module.graph.nodes:
        name = str(getattr(node.target, "__name__", ""))
        if word in name and trains(node):
            yield Finding(
                code,
                "error",
                node.name,
                f"{name} was traced with training=True: eval() does not switch it off",
                _PT2E if subject.exported else _TRACED,
            )


def _batch_norm(subject: Subject) -> Iterator[Finding]:
    what = "it normalizes by the batch, the conversion by running statistics"
    yield from _in_train_mode(subject, "bn-training", _torch.BATCH_NORM, what)
    yield from _traced_in(subject, "bn-training", "batch_norm")


def _dropout(subject: Subject) -> Iterator[Finding]:
    what = "it drops values at random, the conversion none"
    yield from _in_train_mode(subject, "dropout-training", _torch.DROPOUT, what)
    yield from _traced_in(subject, "dropout-training", "dropout")


def _random(subject: Subject) -> Iterator[Finding]:
    if subject.training:
        return
    known = {f.site for check in (_batch_norm, _dropout) for f in check(subject)}
    for node in drawing(subject.graph_module):
        if node.name not in known and str(node.target) not in known:
            yield Finding(
                "nondeterministic",
                "warning",
                node.name,
                f"{node.target} draws random numbers: two runs on one batch differ",
                "switch it off in eval mode; no comparison can tell it from an error",
            )


PLACE = 20
CHECKS = (
    Check("bn-training", "BatchNorm in train mode, or traced in train mode", _batch_norm),
    Check("dropout-training", "dropout in train mode, or traced in train mode", _dropout),
    Check("nondeterministic", "ops that draw random numbers", _random),
)
