"""The command judge: parameters and a dump, no model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fxqfix.cli import _output
from fxqfix.report import text
from fxqfix.report.verdict import exit_code

__all__ = ["deviations", "judge"]

_JUDGEMENT: _output.Writers = {
    ".json": lambda judgement: judgement.to_json(),
    ".txt": lambda judgement: f"{judgement}\n",
}


def judge(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of `judge`."""
    parser.add_argument("parameters", type=Path, help="a file that Parameters.save wrote")
    parser.add_argument(
        "answers",
        type=Path,
        help="what the device computed: .npz, .safetensors, .json, or a folder of .npy files or of "
        "raw files with a manifest.json",
    )
    parser.add_argument(
        "--golden", type=Path, metavar="FILE", help="a file that GoldenVectors.save wrote"
    )
    parser.add_argument(
        "--fail-on-difference", action="store_true", help="exit with 1 unless every code is equal"
    )
    _output.add_format(parser)
    _output.add_output(parser, _JUDGEMENT)
    return _judge


def deviations(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of `deviations`."""
    _output.add_format(parser)
    return _deviations


def _judge(args: argparse.Namespace) -> int:
    from fxqfix import GoldenVectors, Parameters, judge

    _output.check(args.output, _JUDGEMENT)
    text.check(args.format or "simple")
    golden = None if args.golden is None else GoldenVectors.load(args.golden)
    found = judge(Parameters.load(args.parameters), args.answers, golden=golden)
    _output.write(args.output, found, _JUDGEMENT)
    print(found.table(args.format) if args.format else found)
    code = exit_code([found])
    return 1 if args.fail_on_difference and code == 0 and not found.exact else code


def _deviations(args: argparse.Namespace) -> int:
    from fxqfix.deviations import registry

    lines = ((d.name, f"the device {d.summary}", d.remedy) for d in registry().values())
    print(text.listing(("deviation", "what it is", "to change"), lines, args.format or "simple"))
    return 0
