"""Which range a QConfig or QConfigMapping declares for a value."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from fxqfix import _torch

__all__ = ["qconfig_range"]


def qconfig_range(
    qconfig: Any, module: str, targets: Collection[Any] = ()
) -> tuple[int, int] | None:
    """(quant_min, quant_max) that a QConfig or QConfigMapping declares for a value, if any.

    Args:
        qconfig: A QConfig, or a QConfigMapping; the most specific entry counts, as in prepare_fx:
            module name, module-name regex, object type, global.
        module: Path of the module that the value comes from.
        targets: Functions, module classes and method names of the op, for entries by object type.
    """
    found = qconfig
    if hasattr(qconfig, "global_qconfig"):
        found = _lookup(qconfig, module, targets)
    if found is None or not hasattr(found, "activation"):
        return None
    with _torch.quiet():
        quantizer = found.activation()
    observer = getattr(quantizer, "activation_post_process", quantizer)
    low, high = getattr(observer, "quant_min", None), getattr(observer, "quant_max", None)
    return None if low is None or high is None else (int(low), int(high))


def _lookup(mapping: Any, module: str, targets: Collection[Any]) -> Any:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        path = ".".join(parts[:end])
        if path in mapping.module_name_qconfigs:
            return mapping.module_name_qconfigs[path]
    for pattern, found in mapping.module_name_regex_qconfigs.items():
        if re.match(pattern, module):
            return found
    for target, found in mapping.object_type_qconfigs.items():
        if target in targets:
            return found
    return mapping.global_qconfig
