"""torch's own conversion of a copy of a prepared model."""

from __future__ import annotations

import copy

from torch import fx, nn

from fxqfix import _pt2e, _rng, _torch
from fxqfix.dialects import pt2e
from fxqfix.errors import DialectError, FxqfixError, PassError

__all__ = ["convert_by_torch"]


def convert_by_torch(prepared: nn.Module) -> nn.Module:
    """Convert a copy with `convert_fx` (FX, on the engine in force), `convert` or `convert_pt2e`.

    Args:
        prepared: A prepared model; it is not changed.

    Returns:
        The int8 model; from a PT2E model the decomposed one.

    Raises:
        DialectError: A GraphModule that none of torch's flows prepared.
        MissingDependencyError: No convert_pt2e is installed.
        PassError: torch's conversion raised.
    """
    model = copy.deepcopy(prepared)
    try:
        with _torch.quiet(), _rng.same_rng():
            if not isinstance(model, fx.GraphModule):
                converted: nn.Module = _torch.quantization().convert(model.eval())
            elif pt2e.matches(model):
                converted = _pt2e.convert(model)
            elif _torch.observed_attributes(model) is not None:
                _torch.quantization()
                make = _torch.resolve("torch.ao.quantization.quantize_fx.convert_fx")
                converted = make(model, convert_custom_config=_torch.closed_modules())
            else:
                raise DialectError(
                    "torch can't convert this graph: prepare_fx / prepare_qat_fx did not make it",
                    where="convert",
                    remedy="pass the converted model too: compare(prepared, converted, data)",
                )
    except FxqfixError:
        raise
    except Exception as error:  # whatever torch raises, the caller has to see which step it was
        raise PassError(
            f"torch's own conversion failed: {error}",
            where="convert",
            remedy="see whether torch.ao.quantization's convert takes this model and engine; "
            "pass converted= where you have one",
        ) from error
    return converted
