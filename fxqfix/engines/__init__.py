"""What the engines' kernels compute, in integers; one file per family of ops."""

from fxqfix.engines import (  # noqa: F401  # they fill the table
    activations,
    attention,
    boundary,
    dynamic,
    dynamic_recurrent,
    elementwise,
    listing,
    onednn_fused,
    pools,
    recurrent,
    weighted,
)
from fxqfix.engines._base import ENGINES, ISAS, Call, Kernel, table
from fxqfix.engines._inner import row_of
from fxqfix.engines.calls import calls
from fxqfix.engines.defects import DEFECTS, Defect
from fxqfix.engines.defects import find as find_defect
from fxqfix.engines.dispatch import dispatch
from fxqfix.engines.saturation import Geometry, saturated_sums, saturation_possible

__all__ = [
    "DEFECTS",
    "ENGINES",
    "ISAS",
    "Call",
    "Defect",
    "Geometry",
    "Kernel",
    "calls",
    "dispatch",
    "find_defect",
    "row_of",
    "saturated_sums",
    "saturation_possible",
    "table",
]
