"""lint: a prepared model's state that will make its conversion differ, without any data."""

from __future__ import annotations

import torch
from torch import nn

from fxqfix import _torch, checks, dialects
from fxqfix._settings import entry
from fxqfix.engines import ENGINES
from fxqfix.errors import NonFiniteError
from fxqfix.names import Engine
from fxqfix.registry import check_name
from fxqfix.report.lint import LintReport

__all__ = ["lint"]


@entry
def lint(prepared: nn.Module, *, engine: Engine | None = None) -> LintReport:
    """Look at a prepared model before it is converted.

    Needs no data and runs no forward; cheap enough for every epoch. In train mode, what is normal
    while training (observers and BatchNorm that move) is not found.

    Args:
        prepared: What prepare_fx, prepare_pt2e (or their QAT forms) or eager prepare returned. It
            is not changed.
        engine: "fbgemm", "x86", "onednn" or "qnnpack": the engine to convert for. None means
            torch.backends.quantized.engine.

    Returns:
        The findings, errors first: code, severity, site, evidence, remedy.

    Raises:
        DialectError: The model is not a prepared one.
        UnknownNameError: There is no such engine.
        NonFiniteError: A scale or zero point is NaN or inf, and no weight.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import get_default_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import prepare_fx
        >>> x, net = torch.ones(1, 8), torch.nn.Sequential(torch.nn.Linear(8, 2)).eval()
        >>> prepared = prepare_fx(net, get_default_qconfig_mapping("qnnpack"), (x,))
        >>> [(f.code, f.site) for f in lint(prepared, engine="qnnpack").of("error")]
        [('uncalibrated', 'input_1'), ('uncalibrated', '_0')]
    """
    chosen = check_name("engine", engine or torch.backends.quantized.engine, ENGINES, "lint")
    with _torch.quiet():
        broken = list(checks.not_finite(prepared))
        try:
            # Observers that are on are a finding of their own; settling them takes half the time.
            reading = dialects.read_prepared(prepared, "lint", settled=False)
        except NonFiniteError as error:
            if not broken:
                raise
            said = error.where or "", str(error.found), error.remedy or ""
            held = checks.Finding("non-finite", "error", *said)
            return LintReport((*broken, held), chosen)  # observers saw what such weights gave
        subject = checks.Subject(reading, chosen, reading.training)
        found = [finding for check in checks.registry() for finding in check.run(subject)]
    found.sort(key=lambda f: checks.SEVERITIES.index(f.severity))
    return LintReport(tuple(found), chosen, len(reading.taps))
