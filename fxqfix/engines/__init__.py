"""What the engines' kernels compute, in integers; one file per family of ops."""

from fxqfix.engines import boundary, weighted  # noqa: F401  # they fill the table
from fxqfix.engines._base import ENGINES, ISAS, Call, Kernel, table
from fxqfix.engines.dispatch import dispatch
from fxqfix.engines.saturation import Geometry, saturated_sums

__all__ = [
    "ENGINES",
    "ISAS",
    "Call",
    "Geometry",
    "Kernel",
    "dispatch",
    "saturated_sums",
    "table",
]
