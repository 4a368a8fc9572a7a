"""One int8 convolution beside the same one in float64, in a process of its own: it may die.

Run as a script with a JSON object of `is_wrong`'s arguments; it imports torch and nothing else.
"""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from typing import Any

import torch

__all__ = ["ask", "is_wrong"]

_SECONDS = 120


def is_wrong(
    engine: str,
    shape: list[int],
    outputs: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    point: int = 64,
    times: int = 3,
) -> bool:
    """Whether an engine's convolution is more than 2 codes off its op; the process may die of it.

    Args:
        engine: The engine.
        shape: Of the input.
        outputs: Channels of the output.
        kernel: Size of the kernel, as many numbers as stride, padding and dilation have.
        stride: As torch has it.
        padding: As torch has it.
        dilation: As torch has it.
        groups: As torch has it.
        point: The input's zero point.
        times: How often it is run; what corrupts memory shows later.
    """
    dims = len(kernel)
    torch.backends.quantized.engine = engine
    ops: Any = torch.ops.quantized
    name, format_ = f"conv{dims}d", torch.channels_last if dims == 2 else torch.channels_last_3d
    size = [outputs, shape[1] // groups, *kernel]
    x = (torch.arange(math.prod(shape)) * 37 % 128).reshape(shape).double() - point
    w = (torch.arange(math.prod(size)) * 29 % 61 - 30).reshape(size).double()
    options = stride, padding, dilation, groups
    wanted = getattr(torch.nn.functional, name)(x, w, None, *options)
    scale = float(wanted.abs().max()) / 100 + 1.0
    wanted = (wanted / scale + 128).clamp(0, 255)
    weight = torch.quantize_per_tensor(w.float(), 1.0, 0, torch.qint8)
    packed = getattr(ops, f"{name}_prepack")(weight, None, *options)
    codes = torch.quantize_per_tensor(x.float(), 1.0, point, torch.quint8)
    given = codes.contiguous(memory_format=format_)
    found = [getattr(ops, name)(given, packed, scale, 128).int_repr() for _ in range(times)]
    return any(bool(((f.double() - wanted).abs() > 2.1).any()) for f in found)


def ask(**options: Any) -> bool | None:
    """What `is_wrong` says in a process of its own, under the same caps; None: it can't be asked.

    A process that dies says that the kernel is wrong.
    """
    if not sys.executable:
        return None
    command = [sys.executable, "-W", "ignore", "-c", inspect.getsource(sys.modules[__name__])]
    try:
        done = subprocess.run(
            [*command, json.dumps(options)],
            capture_output=True,
            check=False,
            text=True,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = done.stdout.strip()
    if done.returncode == 0 and said in ("True", "False"):
        return said == "True"
    died = done.returncode < 0 or done.returncode >= 0x80000000  # by a signal; as Windows says it
    return True if died else None


if __name__ == "__main__":
    with torch.no_grad():
        print(is_wrong(**json.loads(sys.argv[1])))
