"""The command line: `fxqfix COMMAND`, see `_COMMANDS`.

Models come from a function that the user names, so nothing is ever unpickled. What goes wrong in
the user's code or arguments ends in one line on stderr and exit code 2, never in a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from fxqfix.cli import _answers, _deploy, _judge, _lists, _rewrite
from fxqfix.errors import FxqfixError

__all__ = ["main"]

# Name -> what adds its arguments to a parser and returns what runs it, and its line of --help.
_COMMANDS = {
    "demo": (_lists.demo, "replay a user report: what they saw, why, and what repairs it"),
    "compare": (_judge.compare, "compare a prepared and a converted model, op by op"),
    "inspect": (_judge.inspect, "list every site where values become quantized"),
    "lint": (_judge.lint, "look for state that will make the conversion differ; no data"),
    "migrate": (
        _deploy.migrate,
        "write a prepared model as a decomposed .pt2 file, and certify that file",
    ),
    "certify": (
        _deploy.certify,
        "run a deployed form beside the decomposed graph; exit with 1 unless it is ok",
    ),
    "judge": (
        _answers.judge,
        "hold what an engine of your own computed against the reference, op by op",
    ),
    "rewrite": (_rewrite.rewrite, "run passes on a model, and print what each edits"),
    "passes": (_lists.passes, "list the passes"),
    "causes": (_lists.causes, "list the causes, and what repairs each"),
    "deviations": (_answers.deviations, "list what `judge` tries where codes differ"),
    "engines": (_lists.engines, "list what is emulated to the code, and known-wrong kernels"),
    "ops": (_lists.ops, "list the op families that are read and compared"),
    "routes": (_lists.routes, "list the ways of deploying that `certify` watches"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        The exit code: 0, 1 (something differs, and the command says so with its code), 2 (an error
        of the user's) or 141 (nobody reads the output).

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxqfix",
        description="Where a converted quantized model differs from the prepared one, and why.",
    )
    parser.add_argument("--version", action="version", version=f"fxqfix {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (add, about) in _COMMANDS.items():
        found = commands.add_parser(name, help=about, description=about)
        found.set_defaults(run=add(found))
    return parser


def _version() -> str:
    try:
        return metadata.version("fxqfix")
    except metadata.PackageNotFoundError:
        return "(not installed)"
