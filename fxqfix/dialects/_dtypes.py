"""Which floats a model computes in, and what of that a conversion can take."""

from __future__ import annotations

import torch

from fxqfix.dialects._base import Reading
from fxqfix.errors import UnsupportedError

__all__ = ["HALVES", "check_floats"]

HALVES = (torch.float16, torch.bfloat16)


def check_floats(reading: Reading, where: str) -> None:
    """Refuse a prepared model in floats that torch's conversion of it does not take.

    The int8 kernels and the reference form take float32. PT2E's decomposed ops take half precision
    too: they compute in float32 and round.

    Args:
        reading: A prepared model's.
        where: The call, for the message.

    Raises:
        UnsupportedError: A quantized weight has another dtype.

    Example:
        >>> import torch
        >>> from fxqfix.dialects import read
        >>> from torch.ao.quantization import default_qat_qconfig, prepare_qat
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2)).half().train()
        >>> net.qconfig = default_qat_qconfig
        >>> check_floats(read(prepare_qat(net)), "to_int8")
        Traceback (most recent call last):
        fxqfix.errors.UnsupportedError: to_int8: the model computes in float16, ...
    """
    taken = {torch.float32, *(HALVES if reading.exported else ())}
    for tap in reading.weights:
        values = tap.weight().values if tap.weight is not None else None
        if values is None or values.dtype in taken or not values.is_floating_point():
            continue
        name = str(values.dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"the model computes in {name}, which torch's conversion does not take",
            where=where,
            found=f"the weight of site {tap.site.name!r} in {name}",
            expected=" or ".join(sorted(str(d).removeprefix("torch.") for d in taken)),
            remedy="pass a float32 copy, copy.deepcopy(model).float(), and batches in float32",
        )
