"""The line of the user's code that calls an op, where the tracer kept it."""

from __future__ import annotations

import re
from pathlib import PurePath

from torch import fx

__all__ = ["source_line"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')
# What stands between the user's own forward and the op: libraries, and code made from a graph.
_NOT_THEIRS = ("site-packages", "dist-packages", "<", "torch/fx/", "torch/nn/")


def source_line(node: fx.Node) -> str:
    r"""The innermost line of the user's own code on the way to a node.

    Args:
        node: A node of a traced graph. Its `stack_trace` is what torch recorded.

    Returns:
        "file.py:12 in forward: y = self.conv(x)"; "" where the tracer recorded none. Of the path
        only the name stays: reports are handed on.

    Example:
        >>> graph = fx.Graph()
        >>> node = graph.placeholder("x")
        >>> node.stack_trace = 'File "net.py", line 3, in forward\n    return self.fc(x)'
        >>> source_line(node)
        'net.py:3 in forward: return self.fc(x)'
    """
    found = ""
    for path, line, function, code in _FRAME.findall(node.stack_trace or ""):
        if not any(part in path.replace("\\", "/") for part in _NOT_THEIRS):
            found = f"{PurePath(path).name}:{line} in {function}: {code.strip()}"
    return found
