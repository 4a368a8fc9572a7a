"""Every error that fxqfix raises: each is an `FxqfixError` and the builtin that fits too.

A message names where (pass, node, module path), what was found, what was expected and what to do,
so that a reader can act on the last line of a traceback alone.
"""

from __future__ import annotations

__all__ = [
    "CheckError",
    "DataError",
    "DeviceError",
    "DialectError",
    "FxqfixError",
    "MissingDependencyError",
    "ModelRunError",
    "NonFiniteError",
    "OptionError",
    "PairingError",
    "PassError",
    "RangeUnknownError",
    "RegistryError",
    "RouteError",
    "TraceError",
    "UncalibratedError",
    "UnknownNameError",
    "UnsupportedError",
    "WriteError",
]


_MOST = 160


def in_brief(error: BaseException) -> str:
    """The first line of a message, cut where it is long: torch goes on with traces and lists.

    Example:
        >>> in_brief(RuntimeError("no such kernel" + chr(10) + "a backtrace"))
        'no such kernel'
    """
    said = str(error).strip().partition("\n")[0]
    if len(said) <= _MOST:
        return said
    return f"{said[:_MOST].rpartition(' ')[0]} ..."


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
    """The model cannot be traced by torch.fx, or the trace computes something else.

    Example:
        >>> import fxqfix, torch
        >>> class Branching(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x if x.sum() > 0 else -x
        >>> fxqfix.trace(Branching())
        Traceback (most recent call last):
        fxqfix.errors.TraceError: trace: FX can't trace Branching: ...
    """


class DialectError(FxqfixError, TypeError):
    """The model is of no dialect that fxqfix reads, or not of the one that a flow needs.

    Example:
        >>> import fxqfix, torch
        >>> fxqfix.inspect(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        fxqfix.errors.DialectError: inspect: Linear holds no observer, fake-quant, ...
    """


class UnsupportedError(FxqfixError, TypeError):
    """An op or module has no row, or no form, that the requested rewrite needs.

    Example:
        >>> import fxqfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> dynamic = torch.ao.quantization.quantize_dynamic(net)
        >>> fxqfix.to_decomposed(dynamic)
        Traceback (most recent call last):
        fxqfix.errors.UnsupportedError: ...
    """


class PairingError(FxqfixError, ValueError):
    """The prepared and the converted model do not belong together (or are swapped).

    Example:
        >>> from fxqfix.report import Report
        >>> Report(rows=(), engine="fbgemm").merge(Report(rows=(), engine="qnnpack"))
        Traceback (most recent call last):
        fxqfix.errors.PairingError: Report.merge: only reports of the same two models can be ...
    """


class RangeUnknownError(FxqfixError, ValueError):
    """quant_min / quant_max of a site can't be known from what was given.

    Example:
        >>> import fxqfix, torch
        >>> int8 = torch.ao.nn.quantized.Quantize(0.1, 0, torch.quint8)
        >>> fxqfix.to_decomposed(torch.nn.Sequential(int8))
        Traceback (most recent call last):
        fxqfix.errors.RangeUnknownError: to_decomposed: a converted model does not hold ...
    """


class RegistryError(FxqfixError, ValueError):
    """A row of a registry is no good: its name is taken, a part is missing, a key is unknown.

    Example:
        >>> from fxqfix.passes import Pass
        >>> class Mine(Pass):
        ...     name = "pin-ranges"
        Traceback (most recent call last):
        fxqfix.errors.RegistryError: ...pass 'pin-ranges': this name is taken. ...
    """


class UncalibratedError(FxqfixError, ValueError):
    """An observer never saw data, so that there are no qparams to use.

    Example:
        >>> import fxqfix, torch
        >>> from torch.ao.quantization import get_default_qat_qconfig, prepare_qat
        >>> net = torch.nn.Sequential(torch.ao.quantization.QuantStub(), torch.nn.Linear(2, 2))
        >>> net.qconfig = get_default_qat_qconfig("fbgemm")
        >>> fxqfix.freeze(prepare_qat(net.train()))
        Traceback (most recent call last):
        fxqfix.errors.UncalibratedError: freeze-qparams, ...
    """


class NonFiniteError(FxqfixError, ValueError):
    """NaN or inf in data or qparams.

    Example:
        >>> import fxqfix, torch
        >>> fxqfix.QParams(float("nan"), 0, 0, 255, torch.quint8)
        Traceback (most recent call last):
        fxqfix.errors.NonFiniteError: QParams: qparams are not finite and positive. ...
    """


class DataError(FxqfixError, ValueError):
    """The data is empty, or is not an iterable of batches.

    Example:
        >>> from fxqfix.report import Report
        >>> Report(rows=()).culprits()
        Traceback (most recent call last):
        fxqfix.errors.DataError: Report.culprits: this report holds no culprits: ...
    """


class CheckError(FxqfixError, AssertionError):
    """A result is not what the caller asked it to be.

    Example:
        >>> from fxqfix import Report
        >>> Report(rows=()).check()
        Traceback (most recent call last):
        fxqfix.errors.CheckError: Report.check: the report is not judged. Found: no site ...
    """


class OptionError(FxqfixError, ValueError):
    """An option has a value that it can't have.

    Example:
        >>> from fxqfix.report import Report
        >>> Report(rows=()).worst(-1)
        Traceback (most recent call last):
        fxqfix.errors.OptionError: Report.worst: n counts rows. Found: -1. ...
    """


def counting(value: object, where: str, what: str) -> None:
    """Refuse what can't be a count.

    Args:
        value: What was given.
        where: The function that it was given to.
        what: The option, and what it counts: "n counts rows".

    Raises:
        OptionError: It is negative, or no whole number.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise OptionError(
            what, where=where, found=repr(value), expected="a whole number, 0 or more"
        )


class ModelRunError(FxqfixError, RuntimeError):
    """A model raised while it ran on a batch.

    Example:
        >>> import fxqfix, torch
        >>> from torch.ao.quantization import QuantStub, get_default_qconfig, prepare
        >>> net = torch.nn.Sequential(QuantStub(), torch.nn.Linear(2, 2)).eval()
        >>> net.qconfig = get_default_qconfig("fbgemm")
        >>> prepared = prepare(net)
        >>> _ = prepared(torch.ones(1, 2))
        >>> fxqfix.compare(prepared, None, [torch.ones(1, 3)], engine="fbgemm")
        Traceback (most recent call last):
        fxqfix.errors.ModelRunError: compare, batch 0: the models can't run this batch: ...
    """


class RouteError(FxqfixError, RuntimeError):
    """A route can't lower, load or run the graph.

    Example:
        >>> raise RouteError("the file does not take this batch", where="migrate")
        Traceback (most recent call last):
        fxqfix.errors.RouteError: migrate: the file does not take this batch.
    """


class DeviceError(FxqfixError, RuntimeError):
    """Model and data are on different devices, or on one that can't run the model.

    Example:
        >>> import fxqfix, torch
        >>> from torch.ao.quantization import QuantStub, get_default_qconfig, prepare
        >>> net = torch.nn.Sequential(QuantStub(), torch.nn.Linear(2, 2)).eval()
        >>> net.qconfig = get_default_qconfig("fbgemm")
        >>> prepared = prepare(net)
        >>> _ = prepared(torch.ones(1, 2))
        >>> fxqfix.compare(prepared, None, [torch.ones(1, 2, device="meta")], engine="fbgemm")
        Traceback (most recent call last):
        fxqfix.errors.DeviceError: compare, batch 0: batch and model are on different devices. ...
    """


class PassError(FxqfixError, RuntimeError):
    """A pass failed, or its result breaks what the pass promises; the input is untouched.

    Example:
        >>> import torch
        >>> from fxqfix.passes import Pass
        >>> class Wrong(Pass):
        ...     def rewrite(self, rewriter):
        ...         rewriter.graph.erase_node(None)
        >>> Wrong()(torch.fx.symbolic_trace(torch.nn.ReLU()))
        Traceback (most recent call last):
        fxqfix.errors.PassError: pass Wrong failed after 0 edits: ...
    """


class MissingDependencyError(FxqfixError, ImportError):
    """An optional package, or a part of torch that a flow needs, is not installed.

    Example:
        >>> from fxqfix._extras import require
        >>> require("no_such_package", "plot", "Report.plot")
        Traceback (most recent call last):
        fxqfix.errors.MissingDependencyError: Report.plot: no_such_package can't be imported. ...
    """


class UnknownNameError(FxqfixError, KeyError):
    """No site, row, pass, cause or demo of that name; the nearest names are listed.

    Example:
        >>> import fxqfix
        >>> fxqfix.report.Report(rows=()).row("conv1")
        Traceback (most recent call last):
        fxqfix.errors.UnknownNameError: Report.row: no row is named 'conv1'...
    """


class WriteError(FxqfixError, OSError):
    """A file can't be written; what was there before is still there.

    Example:
        >>> from fxqfix import Report
        >>> Report(rows=()).to_json("no/such/folder/report.json")
        Traceback (most recent call last):
        fxqfix.errors.WriteError: Report.to_json: the file can't be written. Found: ...
    """
