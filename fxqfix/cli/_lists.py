"""Commands that need no model: the demos, and what the registries hold."""

from __future__ import annotations

import argparse
import inspect as python_inspect
import sys
from collections.abc import Callable, Iterable, Sequence

from fxqfix.cli import _output
from fxqfix.cli._target import UsageError
from fxqfix.errors import MissingDependencyError, UnknownNameError
from fxqfix.report import text

__all__ = ["causes", "demo", "engines", "ops", "passes", "routes"]

Run = Callable[[argparse.Namespace], int]


def demo(parser: argparse.ArgumentParser) -> Run:
    """Add the arguments of `demo`."""
    parser.add_argument("name", nargs="?", default="all", help="one demo; all of them by default")
    return _demo


def engines(parser: argparse.ArgumentParser) -> Run:
    """Add the arguments of `engines`."""
    parser.add_argument(
        "--probe", action="store_true", help="run the known-wrong kernels: are they wrong here?"
    )
    _output.add_format(parser)
    return _engines


def _demo(args: argparse.Namespace) -> int:
    from fxqfix import demos

    known = demos.names()
    if args.name != "all":
        try:
            demos.run(args.name, sys.stdout)
        except UnknownNameError as error:
            expected = f"{', '.join(known)} or all"
            raise UsageError(f"no demo is named {args.name!r}", expected=expected) from error
        return 0
    played = [name for name in known if _played(name)]
    return 0 if played else 2


def _played(name: str) -> bool:
    """Run one of all demos; one that needs an extra is left out, and said so."""
    from fxqfix import demos

    try:
        demos.run(name, sys.stdout)
    except MissingDependencyError as error:
        print(f"fxqfix: left out: {error}", file=sys.stderr)
        return False
    return True


def _passes(args: argparse.Namespace) -> int:
    from fxqfix.passes import registry

    return _list(args, ("pass", "what it does"), ((n, _summary(p)) for n, p in registry().items()))


def _causes(args: argparse.Namespace) -> int:
    from fxqfix.causes import registry

    lines = ((cause.name, cause.summary, cause.repair or "-") for cause in registry())
    return _list(args, ("cause", "what it is", "repaired by"), lines)


def _engines(args: argparse.Namespace) -> int:
    from fxqfix.engines import listing

    _list(args, *listing.coverage())
    print("\nx86 runs convolutions on onednn where the CPU has VNNI, all else on fbgemm.\n")
    return _list(args, *listing.known_wrong(probe=args.probe))


def _ops(args: argparse.Namespace) -> int:
    from fxqfix.ops import TABLE

    return _list(args, ("op", "family", "output"), ((s.key, s.family, s.output) for s in TABLE))


def _routes(args: argparse.Namespace) -> int:
    from fxqfix.routes import plugins, registry

    lines = [(r.name, r.summary, r.extra or "-") for r in registry().values()]
    lines += [(p.name, f"a plug-in: {p.value}", "-") for p in plugins().values()]
    return _list(args, ("route", "what it is", "extra"), lines)


def _list(args: argparse.Namespace, headers: Sequence[str], lines: Iterable[Sequence[str]]) -> int:
    print(text.listing(headers, lines, args.format or "simple"))
    return 0


def _summary(documented: object) -> str:
    return (python_inspect.getdoc(documented) or "").partition("\n")[0]


def _listing(run: Run) -> Callable[[argparse.ArgumentParser], Run]:
    """A command without arguments but `--format`."""

    def add(parser: argparse.ArgumentParser) -> Run:
        _output.add_format(parser)
        return run

    return add


passes, causes, ops, routes = map(_listing, (_passes, _causes, _ops, _routes))
