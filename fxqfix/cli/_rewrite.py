"""The command that runs passes: rewrite."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from torch import fx

from fxqfix.cli._target import models
from fxqfix.dialects import trace
from fxqfix.passes import Pass, PassResult, chain, parse

__all__ = ["rewrite"]


def rewrite(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of `rewrite`."""
    parser.add_argument("target", help="pkg.module:function that returns a model")
    parser.add_argument(
        "pipeline",
        help="passes in their order: 'freeze-qparams,fold-batchnorm', options in braces: "
        "'pin-ranges{where=codes}'; `fxqfix passes` lists them",
    )
    parser.add_argument("--code", action="store_true", help="print the code behind each pass")
    return _rewrite


def _rewrite(args: argparse.Namespace) -> int:
    steps = parse(args.pipeline)

    def said(step: Pass, result: PassResult) -> None:
        print(f"{step}: {len(result.edits)} edits")
        print("".join(f"  {line}\n" for line in (*result.edits, *result.remarks)), end="")
        if args.code and isinstance(result.graph_module, fx.GraphModule):
            print(result.graph_module.code.strip())

    chain(trace(models(args.target).prepared), *steps, between=said)
    return 0
