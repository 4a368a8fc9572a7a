"""One registry for all that is looked up by name: it refuses mistakes at import.

A plug-in folder registers its files by itself: every public module of it is imported, and has to
hold a row. Nothing lists them a second time.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from importlib import import_module
from operator import attrgetter
from types import ModuleType
from typing import Any, Generic, TypeVar

from fxqfix.errors import RegistryError, UnknownNameError

__all__ = ["Registry", "check_name", "plugins"]

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
N = TypeVar("N", bound=str)


class Registry(Mapping[K, T], Generic[K, T]):
    """Rows by key, in the order in which they were added.

    Args:
        kind: What a row is, for messages.
        key: Gives a row's key; by default its `name`.
        parts: Attributes that no row may leave empty.
        check: Says what is wrong with a row, None where nothing is.

    Example:
        >>> from fxqfix.causes import Cause
        >>> causes = Registry("cause", parts=("summary",))
        >>> causes.add(Cause("lost", "a range is lost", "", ""), module="causes.lost")
        >>> causes.add(Cause("lost", "it is lost again", "", ""), module="causes.again")
        Traceback (most recent call last):
        fxqfix.errors.RegistryError: causes/again.py, cause 'lost': this name is taken. ...
    """

    def __init__(
        self,
        kind: str,
        *,
        key: Callable[[T], K] = attrgetter("name"),
        parts: Collection[str] = (),
        check: Callable[[T], str | None] = lambda _: None,
    ) -> None:
        self._kind, self._key, self._parts, self._check = kind, key, parts, check
        self._rows: dict[K, T] = {}
        self._files: dict[K, str] = {}

    def add(self, *rows: T, module: str) -> None:
        """Add rows.

        Args:
            rows: The rows. A class that is defined again under its own name (a notebook's cell that
                runs twice) takes its row over.
            module: Name of the module whose rows they are.

        Raises:
            RegistryError: A key is taken, a part is missing, or the check finds something.
        """
        file = _file(module)
        for row in rows:
            key = self._key(row)
            where = f"{file}, {self._kind} {key!r}"
            for part in self._parts:
                if not getattr(row, part):
                    raise RegistryError(f"it has no {part}", where=where)
            if problem := self._check(row):
                raise RegistryError(problem, where=where)
            if key in self._rows and not _again(self._rows[key], row):
                raise RegistryError(
                    "this name is taken", where=where, found=f"one of {self._files[key]}"
                )
            self._rows[key], self._files[key] = row, file

    def discover(self, package: str, part: str = "", *, but: Collection[str] | None = ()) -> None:
        """Add the rows of a plug-in folder.

        Args:
            package: Name of the folder's package.
            part: The name under which a file holds its row, or with an S its rows; "": the module
                itself is the row.
            but: See `plugins`; None: files without a row are no plug-ins.

        Raises:
            RegistryError: As for `add`, or a file has no such name.
        """
        for module in plugins(package, but=but or ()):
            rows: tuple[Any, ...] = getattr(module, f"{part}S", ()) if part else (module,)
            rows = (*rows, getattr(module, part)) if hasattr(module, part) else rows
            if not rows and but is not None:
                raise RegistryError(
                    f"this file holds no {self._kind}",
                    where=_file(module.__name__),
                    expected=part,
                )
            self.add(*rows, module=module.__name__)

    def __getitem__(self, key: K) -> T:
        if key not in self._rows:
            raise UnknownNameError(
                f"there is no {self._kind} {key!r}", expected=", ".join(map(str, self._rows))
            )
        return self._rows[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _again(old: object, new: object) -> bool:
    """Whether a class is defined once more, by the same statement."""
    if not (isinstance(old, type) and isinstance(new, type)):
        return False
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)


def plugins(package: str, *, but: Collection[str] = ()) -> list[ModuleType]:
    """Import the public modules of a folder.

    Args:
        package: Name of the folder's package.
        but: Its public modules that are no plug-ins.

    Returns:
        The modules, by their `PLACE` where the folder has an order, else by name.

    Raises:
        RegistryError: In a folder with an order, a file has no place, or that of another.
    """
    names = [found.name for found in pkgutil.iter_modules(import_module(package).__path__)]
    public = [name for name in names if not name.startswith("_") and name not in but]
    modules = [import_module(f"{package}.{name}") for name in public]
    if not any(hasattr(module, "PLACE") for module in modules):
        return modules
    places: dict[Any, ModuleType] = {}
    for module in modules:
        place = getattr(module, "PLACE", None)
        if place is None or place in places:
            raise RegistryError(
                "this file has no PLACE" if place is None else "this place is taken",
                where=_file(module.__name__),
                found=None if place is None else f"{place}, as in {_file(places[place].__name__)}",
            )
        places[place] = module
    return [places[place] for place in sorted(places)]


def _file(module: str) -> str:
    return module if module == "__main__" else f"{module.replace('.', '/')}.py"


def check_name(kind: str, name: str, known: Collection[N], where: str = "emulate") -> N:
    """Return a name that is known.

    Raises:
        UnknownNameError: It is not.
    """
    for found in known:
        if found == name:
            return found
    raise UnknownNameError(
        f"there is no {kind} {name!r}", where=where, found=name, expected=", ".join(known)
    )
