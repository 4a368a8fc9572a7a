"""Passes as text: `name{option=value other=[1,2]}`, and several of them behind commas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from fxqfix.errors import OptionError

__all__ = ["options_of", "split", "written"]

_WORD = re.compile(r"[A-Za-z_][\w.-]*")
_NAME = re.compile(r"\s*([\w-]+)\s*")
_KNOWN = {"true": True, "false": False, "none": None}


def written(name: str, step: Any) -> str:
    """A pass as text: its name, and the options that are not the default."""
    given = [(f.name, getattr(step, f.name)) for f in fields(step) if f.init]
    defaults = {f.name: _default(f) for f in fields(step)}
    said = [f"{key}={_text(value)}" for key, value in given if value != defaults[key]]
    return f"{name}{{{' '.join(said)}}}" if said else name


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _text(value: Any) -> str:
    """A value as `_value` reads it; "..." for what can't be written: models, functions."""
    if isinstance(value, str) and _WORD.fullmatch(value) and value not in _KNOWN:
        return value
    if value is None or isinstance(value, bool):
        return str(value).lower()
    try:
        return json.dumps(value, default=_plain, separators=(",", ":"))
    except TypeError:
        return "..."


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError


def split(text: str) -> list[tuple[str, str]]:
    """The passes of a pipeline: (name, options as text).

    Raises:
        OptionError: It is no pipeline.

    Example:
        >>> split("freeze-qparams, pin-ranges{where=codes}")
        [('freeze-qparams', ''), ('pin-ranges', 'where=codes')]
    """
    found, at = [], 0
    while True:
        name = _NAME.match(text, at)
        if name is None:
            raise _refuse(text, at, "a pass's name")
        at, options = name.end(), ""
        if text.startswith("{", at):
            end = _end(text, at)
            at, options = end + 1, text[at + 1 : end]
        found.append((name.group(1), options))
        rest = text[at:].lstrip()
        if not rest:
            return found
        if not rest.startswith(","):
            raise _refuse(text, at, "a comma")
        at = text.index(",", at) + 1


def _end(text: str, start: int) -> int:
    """Where the brace of `start` is closed; braces in strings do not count."""
    depth = 0
    for found in re.compile(r'"(?:[^"\\]|\\.)*"|[{}]').finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if not depth:
            return found.start()
    raise _refuse(text, len(text), "a closing brace")


def options_of(name: str, kind: type, text: str) -> dict[str, Any]:
    """The options of a pass, from their text.

    Args:
        name: The pass's name, for messages.
        kind: Its class.
        text: `option=value other=value`.

    Raises:
        OptionError: There is no such option, it has no such value, or one is missing.

    Example:
        >>> from fxqfix.passes import PinRanges
        >>> options_of("pin-ranges", PinRanges, 'ranges={"x":[0,127]} where=codes')
        {'ranges': {'x': (0, 127)}, 'where': 'codes'}
    """
    known: dict[str, Field[Any]] = {f.name: f for f in fields(kind) if f.init}
    given: dict[str, Any] = {}
    at = 0
    while text[at:].strip():
        found = re.compile(r"\s*(\w+)=").match(text, at)
        if found is None or found.group(1) in given:
            raise _refuse(text, at, "option=value", where=name)
        key = found.group(1)
        if key not in known:
            raise OptionError(
                f"{name} has no option {key!r}",
                where="parse",
                expected=", ".join(known) or "no option",
            )
        value, at = _value(text, found.end(), name)
        given[key] = frozenset(value) if isinstance(_default(known[key]), frozenset) else value
    missing = [key for key, f in known.items() if _default(f) is MISSING and key not in given]
    if missing:
        raise OptionError(f"{name} needs {', '.join(missing)}", where="parse", found=text or None)
    return given


def _value(text: str, at: int, where: str) -> tuple[Any, int]:
    """A value, and where it ends."""
    if word := _WORD.match(text, at):
        return _KNOWN.get(word.group(), word.group()), word.end()
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _refuse(text, at, "a word, or a value in JSON", where=where) from error
    return _frozen(value), end


def _frozen(value: Any) -> Any:
    """Tuples in place of lists, as options of passes have them."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_frozen(item) for item in value)
    return value


def _refuse(text: str, at: int, expected: str, where: str = "") -> OptionError:
    return OptionError(
        "this is no pipeline of passes" if not where else f"the options of {where} can't be read",
        where="parse",
        found=f"{text!r}, at {text[at : at + 20]!r}",
        expected=f"{expected}, as in freeze-qparams,pin-ranges{{where=codes}}",
    )
