"""What the engines' kernels compute, in integers; one file per family of ops."""

from fxqfix.engines._base import ENGINES, Call, Kernel, Present, table
from fxqfix.engines._inner import row_of
from fxqfix.engines._intervals import Interval, intervals
from fxqfix.engines._requantize import Qnnpack, Weighted
from fxqfix.engines.calls import calls
from fxqfix.engines.defects import DEFECTS, Defect, met
from fxqfix.engines.defects import find as find_defect
from fxqfix.engines.defects import rows as defect_rows
from fxqfix.engines.dispatch import dispatch, placed
from fxqfix.engines.isa import ISAS, Isa, isa_of, threads_of
from fxqfix.engines.saturation import saturation_possible
from fxqfix.engines.weighted import accumulator_bound
from fxqfix.registry import plugins

__all__ = [
    "DEFECTS",
    "ENGINES",
    "ISAS",
    "Call",
    "Defect",
    "Interval",
    "Isa",
    "Kernel",
    "Present",
    "Qnnpack",
    "Weighted",
    "accumulator_bound",
    "calls",
    "defect_rows",
    "dispatch",
    "find_defect",
    "intervals",
    "isa_of",
    "met",
    "placed",
    "row_of",
    "saturation_possible",
    "table",
    "threads_of",
]

plugins(__name__)  # kernels register themselves
