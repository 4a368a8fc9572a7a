"""What went wrong at the bottom of an error that others wrap."""

from __future__ import annotations

import re
import traceback

__all__ = ["innermost"]

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TEMPORARY = re.compile(r"\S*/tmp\w{8}/")  # names of folders that are gone
_MOST = 300


def innermost(error: BaseException) -> str:
    """The kind and the reason of the first error in a chain, in one line.

    Compilers and exporters wrap what they met, and say first how they got there.

    Args:
        error: The last one.

    Example:
        >>> try:
        ...     try:
        ...         raise ValueError("int16 is not taken")
        ...     except ValueError as error:
        ...         raise RuntimeError("export failed:") from error
        ... except RuntimeError as error:
        ...     innermost(error)
        'ValueError: int16 is not taken'
    """
    found, seen, last = error, set[int](), error
    while id(last) not in seen:
        seen.add(id(last))
        if str(last).strip() or not str(found).strip():
            found = last
        inner = getattr(last, "inner_exception", None) or last.__cause__ or last.__context__
        if not isinstance(inner, Exception):
            break
        last = inner
    if not str(last).strip():  # an assertion says nothing but where it stands
        return f"{type(last).__name__}{_place(last)}"
    return f"{type(found).__name__}: {_line(str(found))}"


def _line(text: str) -> str:
    lines = [line.strip() for line in _ESCAPES.sub("", text).splitlines() if line.strip()]
    telling = [line for line in lines if not line.endswith(":")] or lines
    line = _TEMPORARY.sub("", telling[0]).rstrip(".")
    return line if len(line) <= _MOST else f"{line[:_MOST]} ..."


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" in {frames[-1].name}: {frames[-1].line}" if frames else ""
