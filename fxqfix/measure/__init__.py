"""Probes, streaming statistics and the runner."""

from fxqfix.measure.compared import differing, discrepancy, float_discrepancy
from fxqfix.measure.culprits import Corrector, Culprit
from fxqfix.measure.discrepancy import Discrepancy, decibels
from fxqfix.measure.histogram import Histogram, histogram
from fxqfix.measure.outputs import OutputProbe, Returned
from fxqfix.measure.probe import Probe
from fxqfix.measure.run import (
    STRAYED,
    Run,
    batches_of,
    cannot_run,
    check_values,
    positional,
    run,
    strayed,
    streamed,
    tensors_of,
)
from fxqfix.measure.state import State, held

__all__ = [
    "STRAYED",
    "Corrector",
    "Culprit",
    "Discrepancy",
    "Histogram",
    "OutputProbe",
    "Probe",
    "Returned",
    "Run",
    "State",
    "batches_of",
    "cannot_run",
    "check_values",
    "decibels",
    "differing",
    "discrepancy",
    "float_discrepancy",
    "held",
    "histogram",
    "positional",
    "run",
    "strayed",
    "streamed",
    "tensors_of",
]
