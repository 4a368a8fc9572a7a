"""Commands that judge models: compare, inspect, lint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

from fxqfix.cli import _output
from fxqfix.cli._target import models
from fxqfix.errors import CheckError
from fxqfix.report import Report, text
from fxqfix.report.renderings import FORMATS
from fxqfix.report.verdict import exit_code

__all__ = ["compare", "inspect", "lint"]

_FORMATS = [FORMATS[suffix] for suffix in sorted(FORMATS)]
_REPORT: _output.Writers = {r.suffix: r.report for r in _FORMATS}
_INSPECTION: _output.Writers = {
    r.suffix: r.inspection for r in _FORMATS if r.inspection is not None
}


def compare(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of `compare`."""
    parser.add_argument(
        "target",
        help="pkg.module:function that returns (prepared, converted or None, data), or a dict with "
        "these keys and any of engine, float_model",
    )
    parser.add_argument("--engine", help="the engine to run on; the target's or the current one")
    parser.add_argument(
        "--culprits", type=_count, default=0, metavar="N", help="correct the N worst sites alone"
    )
    parser.add_argument("--sort", metavar="COLUMN", help="sort the rows by a column, worst first")
    parser.add_argument("--limit", type=_count, metavar="N", help="show the first N rows")
    parser.add_argument(
        "--fail-on-difference",
        action="store_true",
        help="exit with 1 unless the report is exact",
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="CAUSE", help="accept a cause; repeatable"
    )
    parser.add_argument(
        "--max-share",
        type=float,
        metavar="SHARE",
        help="largest share (0 to 1) of codes of one site that may differ on the same inputs",
    )
    _output.add_format(parser)
    _output.add_output(parser, _REPORT)
    return _compare


def inspect(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of `inspect`."""
    parser.add_argument("target", help="pkg.module:function that returns a model")
    _output.add_format(parser)
    _output.add_output(parser, _INSPECTION)
    return _inspect


def lint(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of `lint`."""
    parser.add_argument("target", help="pkg.module:function that returns a prepared model")
    parser.add_argument("--engine", help="the engine to convert for; the current one by default")
    _output.add_format(parser)
    return _lint


def _count(argument: str) -> int:
    if not (argument.isdecimal() and int(argument)):
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {argument!r}")
    return int(argument)


def _compare(args: argparse.Namespace) -> int:
    from fxqfix import compare

    _output.check(args.output, _REPORT)
    text.check(args.format or "simple", args.sort)
    given = models(args.target)
    report = compare(
        given.prepared,
        given.converted,
        given.batches,
        engine=args.engine or given.engine,
        culprits=args.culprits,
        float_model=given.float_model,
    )
    report = replace(report, made={"model": args.target, **report.made})
    render = text.table if args.format else text.render
    _output.write(args.output, report, _REPORT)
    print(render(report, fmt=args.format or "simple", sort=args.sort, limit=args.limit))
    code = exit_code([report])
    if args.allow or args.max_share is not None:
        code = _checked(report, args.allow, args.max_share)
    return 1 if args.fail_on_difference and code == 0 and not report.exact else code


def _checked(report: Report, allow: list[str], max_share: float | None) -> int:
    """The exit code with some causes allowed; the reason goes to stderr."""
    try:
        report.check(allow, max_share)
    except CheckError as error:
        print(f"fxqfix: {error}", file=sys.stderr)
        return 1 if "not ok" in error.what else 2
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from fxqfix import inspect

    _output.check(args.output, _INSPECTION)
    text.check(args.format or "simple")
    found = inspect(models(args.target).prepared)
    render = text.inspection_table if args.format else text.render_inspection
    _output.write(args.output, found, _INSPECTION)
    print(render(found, fmt=args.format or "simple"))
    return 0


def _lint(args: argparse.Namespace) -> int:
    from fxqfix import lint

    text.check(args.format or "simple")
    given = models(args.target)
    found = lint(given.prepared, engine=args.engine or given.engine)
    print(found.table(args.format) if args.format else found)
    return 0 if found.ok else 1
