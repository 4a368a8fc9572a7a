"""Every error that fxqfix raises: each is an `FxqfixError` and the apt builtin too.

A message names where (pass, node, module path), what was found, what was expected and what to do,
so that a reader can act on the last line of a traceback alone.
"""

from __future__ import annotations

__all__ = [
    "DataError",
    "DeviceError",
    "DialectError",
    "FxqfixError",
    "MissingDependencyError",
    "ModelRunError",
    "NonFiniteError",
    "PairingError",
    "PassError",
    "RangeUnknownError",
    "RouteError",
    "TraceError",
    "UncalibratedError",
    "UnknownNameError",
    "UnsupportedError",
]


class FxqfixError(Exception):
    """Base of all errors of fxqfix.

    Args:
        what: What went wrong, in one sentence.
        where: Pass, node, site or module path.
        found: What was found there.
        expected: What was expected there.
        remedy: What the caller can do about it.

    Example:
        >>> print(FxqfixError("no site is quantized", where="inspect", remedy="prepare it first"))
        inspect: no site is quantized. To do: prepare it first.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.where = what, where
        self.found, self.expected, self.remedy = found, expected, remedy
        parts = [f"{where}: {what}" if where else what]
        if found is not None:
            parts.append(f"Found: {found}")
        if expected is not None:
            parts.append(f"Expected: {expected}")
        if remedy is not None:
            parts.append(f"To do: {remedy}")
        super().__init__(" ".join(p if p.endswith("?") else p.rstrip(".") + "." for p in parts))

    def __str__(self) -> str:
        # KeyError would print the repr; every subclass prints the sentence itself.
        return str(self.args[0])


class TraceError(FxqfixError, TypeError):
    """The model cannot be traced by torch.fx, or the trace computes something else."""


class DialectError(FxqfixError, TypeError):
    """The model is of no dialect that fxqfix reads, or not of the one that a flow needs."""


class UnsupportedError(FxqfixError, TypeError):
    """An op or module has no row, or no form, that the requested rewrite needs."""


class PairingError(FxqfixError, ValueError):
    """The prepared and the converted model do not belong together (or are swapped)."""


class RangeUnknownError(FxqfixError, ValueError):
    """quant_min / quant_max of a site can't be known from what was given."""


class UncalibratedError(FxqfixError, ValueError):
    """An observer never saw data, so that there are no qparams to use."""


class NonFiniteError(FxqfixError, ValueError):
    """NaN or inf in data or qparams."""


class DataError(FxqfixError, ValueError):
    """The data is empty, or is not an iterable of batches."""


class ModelRunError(FxqfixError, RuntimeError):
    """A model raised while it ran on a batch."""


class RouteError(FxqfixError, RuntimeError):
    """A route can't lower, load or run the graph."""


class DeviceError(FxqfixError, RuntimeError):
    """Model and data are on different devices, or on one that can't run the model."""


class PassError(FxqfixError, RuntimeError):
    """A pass failed, or its result breaks what the pass promises; the input is untouched."""


class MissingDependencyError(FxqfixError, ImportError):
    """An optional package, or a part of torch that a flow needs, is not installed."""


class UnknownNameError(FxqfixError, KeyError):
    """No site, row, pass, cause or demo of that name; the nearest names are listed."""
