"""What a report was made by and of: versions, the model's name, the day."""

from __future__ import annotations

from datetime import datetime
from importlib import metadata

import torch
from torch import nn

__all__ = ["made_of", "versions"]


def versions() -> dict[str, str]:
    """The versions of fxqfix and torch, with torch's build.

    Example:
        >>> sorted(versions())
        ['fxqfix', 'torch']
    """
    git = str(getattr(torch.version, "git_version", None) or "unknown")
    try:
        own = metadata.version("fxqfix")
    except metadata.PackageNotFoundError:  # run from a checkout
        own = "not installed"
    return {"fxqfix": own, "torch": f"{torch.__version__}, build {git[:12]}"}


def made_of(*models: nn.Module | None) -> dict[str, str]:
    """What stands at the top of a report's page.

    Args:
        models: The first whose class says more than "GraphModule" names the model: torch's
            prepare_fx forgets the class of what it prepared.

    Example:
        >>> made_of(None, nn.Linear(2, 2))["model"]
        'Linear'
    """
    names = (type(model).__name__ for model in models if model is not None)
    name = next((n for n in names if n not in ("GraphModule", "Module")), "")
    day = datetime.now().astimezone().date().isoformat()
    return {**({"model": name} if name else {}), **versions(), "date": day}
