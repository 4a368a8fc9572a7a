"""Optional packages: imported where they are used, with an error that names the pip extra."""

from __future__ import annotations

import importlib
from typing import Any

from fxqfix.errors import MissingDependencyError

__all__ = ["require"]


def require(module: str, extra: str, what_for: str) -> Any:
    """Import an optional module.

    Args:
        module: Dotted name of the module.
        extra: The pip extra of fxqfix that installs it.
        what_for: The call that needs it, for the message.

    Returns:
        The module; `Any`, since its types are only there where it is installed.

    Raises:
        MissingDependencyError: It can't be imported.

    Example:
        >>> require("math", "plot", "Report.plot").sqrt(4.0)
        2.0
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{module} can't be imported",
            where=what_for,
            found=str(error),
            remedy=f"pip install 'fxqfix[{extra}]'",
        ) from error
