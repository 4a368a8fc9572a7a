"""What the engines' kernels compute, in integers; one file per property."""

from fxqfix.engines.saturation import Geometry, saturated_sums

__all__ = ["Geometry", "saturated_sums"]
