"""The command line: `fxqfix demo | compare | inspect | lint | passes | causes | engines | ops`.

Models come from a function that the user names, so nothing is ever unpickled. What goes wrong in
the user's hands ends in one line on stderr and exit code 2, never in a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import inspect as python_inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from fxqfix.dialects.site import Inspection, closest
from fxqfix.errors import FxqfixError
from fxqfix.report import Report, frame, html, json_, text

__all__ = ["main"]


class UsageError(FxqfixError, ValueError):
    """The command line, or what the named function gives, can't be used."""


@dataclass(frozen=True)
class Models:
    """What the named function gives: two models (or one, or none converted) and data."""

    prepared: Any
    converted: Any = None
    data: Any = None
    engine: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        The exit code: 0, 1 (`--fail-on-difference`), 2 (an error of the user's) or 141 (nobody
        reads the output).

    Example:
        >>> main(["ops", "--format", "no-such-format"])
        2
    """
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        # Output that can't be written shows here and not while the interpreter shuts down.
        sys.stdout.flush()
    except BrokenPipeError:  # `fxqfix ops | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as of a program that SIGPIPE ended: neither "equal" nor "different"
    except (FxqfixError, OSError) as error:
        print(f"fxqfix: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return code


# --- the arguments -------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxqfix",
        description="Where a converted quantized model differs from the prepared one, and why.",
    )
    parser.add_argument("--version", action="version", version=f"fxqfix {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], about: str
    ) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=about, description=about)
        found.set_defaults(run=run)
        return found

    demo = command("demo", _demo, "replay a user report: what they saw, why, and what repairs it")
    demo.add_argument("name", nargs="?", default="all", help="one demo; all of them by default")

    compare = command("compare", _compare, "compare a prepared and a converted model, op by op")
    compare.add_argument(
        "target", help="pkg.module:function that returns (prepared, converted or None, data)"
    )
    compare.add_argument("--sort", metavar="COLUMN", help="sort the rows by a column, worst first")
    compare.add_argument("--limit", type=_count, metavar="N", help="show the first N rows")
    compare.add_argument(
        "--fail-on-difference",
        action="store_true",
        help="exit with 1 unless the report is exact",
    )

    inspect = command("inspect", _inspect, "list every site where values become quantized")
    inspect.add_argument("target", help="pkg.module:function that returns a model")

    lint = command("lint", _lint, "look for state that will make the conversion differ; no data")
    lint.add_argument("target", help="pkg.module:function that returns a prepared model")
    lint.add_argument("--engine", help="the engine to convert for; the current one by default")

    lists = (
        command("passes", _passes, "list the passes"),
        command("causes", _causes, "list the causes, and what repairs each"),
        command("engines", _engines, "list what is emulated to the code, and known-wrong kernels"),
        command("ops", _ops, "list the op families that are read and compared"),
    )
    lists[2].add_argument(
        "--probe", action="store_true", help="run the known-wrong kernels: are they wrong here?"
    )
    for found in (compare, inspect, lint, *lists):
        found.add_argument("--format", metavar="FMT", help="print only the table, in this format")
    for found in (compare, inspect):
        found.add_argument(
            "--output", type=Path, metavar="FILE", help=f"also write FILE ({', '.join(_WRITERS)})"
        )
    return parser


def _count(argument: str) -> int:
    count = int(argument)  # argparse turns the ValueError into its own message
    if count < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return count


def _version() -> str:
    try:
        return metadata.version("fxqfix")
    except metadata.PackageNotFoundError:
        return "(not installed)"


# --- the user's function -------------------------------------------------------------------------


def _call(target: str) -> Any:
    """Call the function that "pkg.module:function" names."""
    module_name, colon, function_name = target.partition(":")
    if not (module_name and colon and function_name):
        raise UsageError(
            "the target names no function", found=target, expected="pkg.module:function"
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
            found=f"functions {', '.join(nearest)}" if nearest else "no function at all",
        )
    return _guarded(f"{target}()", function)


def _guarded(what: str, call: Callable[[], Any]) -> Any:
    """Call the user's code; say in one line what it raised, and where."""
    try:
        return call()
    except FxqfixError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}{_place(error)}"
        raise UsageError(f"{what} failed", found=found) from error


def _place(error: Exception) -> str:
    """The innermost line of the user's own code, which is what they can change."""
    own = [
        line
        for line in traceback.extract_tb(error.__traceback__)
        if Path(line.filename).is_relative_to(Path.cwd())
        and "site-packages" not in line.filename
        and line.filename != __file__
    ]
    return f" (at {Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def _models(target: str, found: Any) -> Models:
    """Read what the function returned: a dict, a tuple, or a single model."""
    if isinstance(found, dict):
        known = [field.name for field in fields(Models)]
        if "prepared" not in found or set(found) - set(known):
            raise UsageError(
                f"{target} returned a dict with other keys",
                found=", ".join(map(str, found)) or "no key",
                expected=f"prepared, and any of {', '.join(known[1:])}",
            )
        return Models(**found)
    if isinstance(found, tuple) and len(found) == 3:
        return Models(*found)
    if callable(found):  # a model of any kind; what it is worth is for fxqfix's readers to say
        return Models(found)
    raise UsageError(
        f"{target} returned something else than models",
        found=f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__,
        expected="(prepared, converted or None, data), or a dict with these keys",
    )


# --- the output ----------------------------------------------------------------------------------


_WRITERS: dict[str, tuple[Callable[[Report], str], Callable[[Inspection], str]]] = {
    ".csv": (frame.to_csv, frame.inspection_to_csv),
    ".json": (json_.to_json, json_.inspection_to_json),
    ".md": (
        lambda report: text.render(report, "github") + "\n",
        lambda inspection: text.render_inspection(inspection, "github") + "\n",
    ),
    ".html": (html.render, html.render_inspection),
}


def _check_output(path: Path | None) -> None:
    """Refuse a file that can't be written, before anything slow runs."""
    if path is None:
        return
    if path.suffix.lower() not in _WRITERS:
        raise UsageError(
            f"--output {path}: the suffix names no format",
            found=path.suffix or "no suffix",
            expected=f"one of {', '.join(_WRITERS)}",
        )
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: there is no folder {path.parent}")


def _write(path: Path | None, result: Report | Inspection) -> None:
    if path is None:
        return
    write_report, write_inspection = _WRITERS[path.suffix.lower()]
    written = write_report(result) if isinstance(result, Report) else write_inspection(result)
    path.write_text(written, encoding="utf-8")
    print(f"fxqfix: wrote {path}", file=sys.stderr)


# --- the commands --------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    from fxqfix import demos

    known = demos.names()
    if args.name not in (*known, "all"):
        raise UsageError(f"no demo is named {args.name!r}", expected=f"{', '.join(known)} or all")
    for name in known if args.name == "all" else [args.name]:
        demos.run(name, sys.stdout)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from fxqfix import compare

    _check_output(args.output)
    text.check(args.format or "simple", args.sort)
    models = _models(args.target, _call(args.target))
    if models.data is None:
        raise UsageError(f"{args.target} returned no data", expected="an iterable of batches")
    report = compare(models.prepared, models.converted, models.data, engine=models.engine)
    render = text.table if args.format else text.render
    _write(args.output, report)
    print(render(report, fmt=args.format or "simple", sort=args.sort, limit=args.limit))
    # Where nothing was compared, nothing was shown to be equal.
    equal = bool(report.rows) and report.exact
    return 1 if args.fail_on_difference and not equal else 0


def _inspect(args: argparse.Namespace) -> int:
    from fxqfix import inspect

    _check_output(args.output)
    text.check(args.format or "simple")
    found = inspect(_models(args.target, _call(args.target)).prepared)
    render = text.inspection_table if args.format else text.render_inspection
    _write(args.output, found)
    print(render(found, fmt=args.format or "simple"))
    return 0


def _lint(args: argparse.Namespace) -> int:
    from fxqfix import lint

    text.check(args.format or "simple")
    models = _models(args.target, _call(args.target))
    found = lint(models.prepared, engine=args.engine or models.engine)
    print(found.table(args.format) if args.format else found)
    return 0 if found.ok else 1


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


def _list(args: argparse.Namespace, headers: Sequence[str], lines: Iterable[Sequence[str]]) -> int:
    print(text.listing(headers, lines, args.format or "simple"))
    return 0


def _summary(documented: object) -> str:
    return (python_inspect.getdoc(documented) or "").partition("\n")[0]
