"""What the demos share: an engine and a seed for a while, and codes in a few characters."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import torch
from torch import Tensor, fx, nn

from fxqfix import _torch
from fxqfix.errors import DeviceError
from fxqfix.report import Report

__all__ = [
    "calls",
    "causes",
    "differing",
    "paragraph",
    "quantized_codes",
    "replay",
    "shorten",
    "supports",
    "title",
]

# Notices of torch itself, to callers who name these things; a replay has to name them.
_NOTICES = {
    "torch.ao.quantization is deprecated": DeprecationWarning,
    "torch.quantize_per_tensor, torch.quantize_per_channel and other quantized": UserWarning,
    "Please use quant_min and quant_max to specify the range for observers": UserWarning,
}


def supports(engine: str) -> bool:
    """Whether this torch has that quantized engine.

    Example:
        >>> supports("abacus")
        False
    """
    return engine in torch.backends.quantized.supported_engines


@contextmanager
def replay(engine: str, seed: int = 0) -> Iterator[None]:
    """Hold an engine, a seed and one thread, silence torch's notices, and put everything back.

    Args:
        engine: The quantized engine that the report was written on.
        seed: What the random state starts from inside.

    Raises:
        DeviceError: This torch does not have the engine.

    Example:
        >>> before = torch.backends.quantized.engine
        >>> with replay(before, seed=1):
        ...     first = torch.rand(1)
        >>> with replay(before, seed=1):
        ...     print(torch.equal(first, torch.rand(1)))
        True
    """
    if not supports(engine):
        raise DeviceError(
            f"this torch has no quantized engine {engine!r}",
            where="demos",
            found=", ".join(torch.backends.quantized.supported_engines),
            remedy="run the demo on a machine whose torch has it",
        )
    before, threads = torch.backends.quantized.engine, torch.get_num_threads()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        for message, category in _NOTICES.items():
            warnings.filterwarnings("ignore", message=message, category=category)
        torch.manual_seed(seed)
        torch.backends.quantized.engine = engine
        torch.set_num_threads(1)  # the order of float sums, and so of training, depends on it
        try:
            yield
        finally:
            torch.backends.quantized.engine = before
            torch.set_num_threads(threads)


def title(out: TextIO, text: str) -> None:
    """Write a headline."""
    print(f"\n{text}\n{'=' * len(text)}", file=out)


def paragraph(out: TextIO, *sentences: str) -> None:
    """Write sentences as one indented paragraph."""
    text = textwrap.fill(" ".join(sentences), 96, break_on_hyphens=False)
    print(textwrap.indent(text, "   "), file=out)


def shorten(codes: Tensor, around: int | None = None) -> str:
    """A row of codes in a few characters: its ends and, where asked, what lies around a place.

    Args:
        codes: A vector of integers.
        around: Index whose neighbours are shown too.

    Example:
        >>> shorten(torch.arange(256), around=128)
        '0 1 ... 126 127 128 129 130 ... 253 254 255'
    """
    row = [str(c) for c in codes.tolist()]
    if around is None:
        return " ".join(row)
    middle = row[around - 2 : around + 3]
    return " ".join([*row[:2], "...", *middle, "...", *row[-3:]])


def differing(a: Tensor, b: Tensor) -> int:
    """Number of elements that differ.

    Example:
        >>> differing(torch.tensor([1, 2]), torch.tensor([1, 3]))
        1
    """
    return int((a != b).sum())


def causes(report: Report) -> str:
    """All causes of a report and their counts, in one line; "none" where nothing differs."""
    return ", ".join(f"{name} {count}" for name, count in report.causes.items()) or "none"


def quantized_codes(decomposed: fx.GraphModule, *inputs: Tensor) -> dict[str, Tensor]:
    """Integer codes that every per-tensor quantize op of a decomposed graph makes, by node name.

    Args:
        decomposed: What `to_decomposed` returned.
        *inputs: The inputs of one forward.

    Returns:
        Codes as int32, in graph order.
    """
    target = _torch.decomposed().quantize_per_tensor.default
    found: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and n.target is target:
                found[n.name] = value.to(torch.int32)
            return value

    with torch.no_grad():
        Recorder(decomposed).run(*inputs)
    return found


def calls(model: nn.Module, x: Tensor) -> Tensor:
    """One forward without gradients."""
    with torch.no_grad():
        output: Tensor = model(x)
    return output
