"""The function that the user names, and what it may return."""

from __future__ import annotations

import importlib
import inspect as python_inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from fxqfix.dialects.site import closest
from fxqfix.errors import FxqfixError
from fxqfix.names import Engine

__all__ = ["Models", "UsageError", "models"]


class UsageError(FxqfixError, ValueError):
    """The command line, or what the named function gives, can't be used."""


@dataclass(frozen=True)
class Models:
    """What the named function gives: two models (or one, or none converted) and data.

    Attributes:
        prepared: The model.
        converted: Its conversion, or None.
        data: Batches, or None.
        engine: The quantized engine, None for the one in force.
        ranges_from: What knows the ranges of a model that has lost them.
        float_model: What was prepared, or None.
        target: The function's name, for messages.
    """

    prepared: Any
    converted: Any = None
    data: Any = None
    engine: Engine | None = None
    ranges_from: Any = None
    float_model: Any = None
    target: str = ""

    @property
    def batches(self) -> Iterable[Any]:
        """The data.

        Raises:
            UsageError: The function returned none.
        """
        if self.data is None:
            raise UsageError(
                f"{self.target} returned no data",
                expected="an iterable of batches: (prepared, converted or None, data)",
            )
        if isinstance(self.data, (Tensor, Mapping)) or not isinstance(self.data, Iterable):
            found: Iterable[Any] = self.data  # what it is worth is for fxqfix to say
            return found
        return _Batches(self.data, f"the data of {self.target}")


@dataclass(frozen=True)
class _Batches:
    """The user's data: what reading it raises is their code's error, as any other."""

    data: Iterable[Any]
    what: str

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]  # a progress bar asks, and takes a TypeError

    def __iter__(self) -> Iterator[Any]:
        batches, end = _guarded(self.what, lambda: iter(self.data)), object()
        while (batch := _guarded(self.what, lambda: next(batches, end))) is not end:
            yield batch


_KEYS = tuple(f.name for f in fields(Models) if f.name != "target")


def models(target: str) -> Models:
    """Call the function that "pkg.module:function" names, and read what it returns.

    Args:
        target: As the user wrote it.

    Raises:
        UsageError: There is no such function, it raised, or returned something else.
    """
    found = _call(target)
    if isinstance(found, dict):
        if "prepared" not in found or set(found) - set(_KEYS):
            raise UsageError(
                f"{target} returned a dict with other keys",
                found=", ".join(map(str, found)) or "no key",
                expected=f"prepared, and any of {', '.join(_KEYS[1:])}",
            )
        return Models(**found, target=target)
    if isinstance(found, tuple) and len(found) == 3:
        return Models(*found, target=target)
    if callable(found):  # a model of any kind; what it is worth is for fxqfix's readers to say
        return Models(found, target=target)
    raise UsageError(
        f"{target} returned something else than models",
        found=f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__,
        expected="(prepared, converted or None, data), or a dict with these keys",
    )


def _call(target: str) -> Any:
    module_name, colon, function_name = target.partition(":")
    if not (module_name and colon and function_name):
        raise UsageError(
            "the target names no function", found=target, expected="pkg.module:function"
        )
    name = Path(module_name).name.removesuffix(".py")
    if module_name.startswith(".") or "/" in module_name or module_name.endswith(".py"):
        raise UsageError(
            "the target is a path, and a module's name is due",
            found=target,
            expected="pkg.module:function",
            remedy=f"write {name}:{function_name}, in the folder of {name}.py",
        )
    if os.getcwd() not in sys.path:  # a console script starts without it
        sys.path.insert(0, os.getcwd())
    module = _guarded(f"import of {module_name}", lambda: importlib.import_module(module_name))
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, f in vars(module).items() if python_inspect.isfunction(f)]
        nearest = closest(function_name, names)
        raise UsageError(
            f"module {module_name} has no function {function_name!r}",
            expected=f"one of its functions: {', '.join(nearest)}" if nearest else None,
            remedy="write a function there that returns the models and data"
            if not nearest
            else "correct the name",
        )
    return _guarded(f"{target}()", function)


def _guarded(what: str, call: Callable[[], Any]) -> Any:
    """Call the user's code; say in one line what it raised, and where."""
    try:
        return call()
    except FxqfixError:
        raise
    except (Exception, SystemExit) as error:  # an exit with 1 would read as "something differs"
        found = f"{type(error).__name__}: {error}{_place(error)}"
        raise UsageError(f"{what} failed", found=found) from error


def _place(error: BaseException) -> str:
    """The innermost line of the user's own code, which is what they can change."""
    own = [
        line
        for line in traceback.extract_tb(error.__traceback__)
        if Path(line.filename).is_relative_to(Path.cwd())
        and "site-packages" not in line.filename
        and line.filename != __file__
    ]
    return f" (at {Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
