"""Commands that leave convert_fx: migrate, certify."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fxqfix.cli import _output
from fxqfix.cli._target import models
from fxqfix.names import PinPlace
from fxqfix.report import Certificate
from fxqfix.report.verdict import exit_code
from fxqfix.routes import find
from fxqfix.routes.migrate import check

__all__ = ["certify", "migrate"]

_PINS: dict[str, bool | PinPlace] = {"values": True, "codes": "codes", "none": False}
_CERTIFICATE: _output.Writers = {
    ".json": lambda certificate: certificate.to_json(),
    ".txt": lambda certificate: f"{certificate}\n",
}


def migrate(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of `migrate`."""
    parser.add_argument(
        "target", help="pkg.module:function that returns (prepared, converted or None, data)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", default=Path("model.pt2"), help="default: model.pt2"
    )
    parser.add_argument(
        "--route", default="export", help="how the file is deployed; default: as it is (export)"
    )
    _dynamic_batch(parser, "the file")
    parser.add_argument(
        "--no-pins", action="store_true", help="leave out the clamps that hold narrow ranges"
    )
    parser.add_argument(
        "--pins",
        choices=("values", "codes", "none"),
        help="where narrow ranges are clamped: on values (default), on codes (for ONNX Runtime's "
        "int8 kernels), or nowhere",
    )
    return _migrate


def certify(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of `certify`."""
    parser.add_argument(
        "target", help="pkg.module:function that returns (prepared, converted or None, data)"
    )
    parser.add_argument("--route", required=True, help="`fxqfix routes` lists them")
    parser.add_argument(
        "--opset", type=int, metavar="N", help="of the ONNX routes; default: the exporter's own"
    )
    _dynamic_batch(parser, "the deployed form")
    _output.add_output(parser, _CERTIFICATE)
    parser.add_argument(
        "--fail-on-difference",
        action="store_true",
        help="exit with 1 unless it is exact; else what is explained and one code apart is ok",
    )
    return _certify


def _dynamic_batch(parser: argparse.ArgumentParser, what: str) -> None:
    about = f"{what} takes any size of the inputs' first dimension"
    parser.add_argument("--dynamic-batch", action="store_true", help=about)


def _migrate(args: argparse.Namespace) -> int:
    from fxqfix import migrate

    check(args.output, args.route)
    given = models(args.target)
    done = migrate(
        given.prepared,
        given.batches,
        args.output,
        converted=given.converted,
        ranges_from=given.ranges_from,
        pin_ranges=_PINS[args.pins] if args.pins else not args.no_pins,
        dynamic_batch=args.dynamic_batch,
        route=args.route,
        engine=given.engine,
    )
    print(done)
    return exit_code([done])


def _certify(args: argparse.Namespace) -> int:
    from fxqfix import certify

    _output.check(args.output, _CERTIFICATE)
    find(args.route)
    given = models(args.target)
    found: Certificate = certify(
        given.prepared,
        args.route,
        given.batches,
        dynamic_batch=args.dynamic_batch,
        opset=args.opset,
    )
    _output.write(args.output, found, _CERTIFICATE)
    print(found)
    code = exit_code([found])
    return 1 if args.fail_on_difference and code == 0 and not found.exact else code
