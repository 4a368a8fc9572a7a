"""Run the Python blocks of a Markdown page, and put what they print under them.

All ```python blocks of a page run in order, in one namespace. What a block prints stands in the
```text block right behind it; a block that prints nothing has none.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FENCE = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n?^```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A Python block, the output that the page shows, and where both stand."""

    code: str
    output: str | None
    start: int
    end: int
    line: int


def blocks(text: str) -> Iterator[Block]:
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        yield Block(found["code"], found["output"], found.start(), found.end(), line)


def run(path: Path, found: list[Block]) -> list[str]:
    """What each block prints, from the same random state, engine and one thread every time."""
    namespace: dict[str, Any] = {"__name__": f"page_{path.stem}"}
    printed = []
    with _settled():
        for block in found:
            # Leading newlines make a traceback's line numbers those of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, namespace)
            printed.append("\n".join(line.rstrip() for line in out.getvalue().splitlines()))
    return [f"{text}\n" if text else "" for text in printed]


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    quantized, threads = torch.backends.quantized, torch.get_num_threads()
    engine = quantized.engine
    torch.set_num_threads(1)  # the order of float sums depends on it
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random.seed(0)
            yield
    finally:
        torch.set_num_threads(threads)
        quantized.engine = engine


def render(path: Path) -> str:
    """The page with every output block as the code prints it now."""
    text = path.read_text(encoding="utf-8")
    found = list(blocks(text))
    parts, position = [], 0
    for block, printed in zip(found, run(path, found), strict=True):
        shown = f"\n```text\n{printed}```\n" if printed else ""
        parts += [text[position : block.start], f"```python\n{block.code}```\n{shown}"]
        position = block.end
    return "".join([*parts, text[position:]])


NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
GRIDS = re.compile(r"(\d+\.\d+)/(-?\d+) -> (\d+\.\d+)/(-?\d+)")


def alike(expected: str, found: str, slack: float = 0.1) -> bool:
    """Whether two outputs say the same: words equal, numbers equal or close.

    Float sums of another CPU round differently. That moves a count by a few codes, the last bits of
    a scale, and the noise floor, which counts nothing else.
    """
    mine, theirs = _words(expected), _words(found)
    if len(mine) != len(theirs):
        return False
    return all(a == b or _close(a, b, slack) for a, b in zip(mine, theirs, strict=True))


def _words(text: str) -> list[str]:
    text = re.sub(r"\(floor [\w.]+\)", "", GRIDS.sub(_one_grid, text))
    text = re.sub(r"\btorch \d+\.\d+[\w.+]*", "torch", text)  # whichever runs the page
    text = re.sub(r"(?<=\d),(?=\d{3} )", "", text)  # 45,490 is one number
    # The rules of a table are as wide as its figures are.
    return [w for w in re.split(r"[\s,;:()/\[\]]+", text) if w.strip("-+=|")]


def _one_grid(found: re.Match[str]) -> str:
    """One grid for two whose scales differ in the last bits of float32."""
    a, zero_a, b, zero_b = found.groups()
    same = zero_a == zero_b and abs(float(a) - float(b)) <= 1e-6 * float(a)
    return f"{a}/{zero_a}" if same else found.group()


def _close(a: str, b: str, slack: float) -> bool:
    if not (NUMBER.fullmatch(a) and NUMBER.fullmatch(b)):
        return False
    x, y = float(a), float(b)
    return abs(x - y) <= max(slack * max(abs(x), abs(y)), 2 if x.is_integer() else 0)
