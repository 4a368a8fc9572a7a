"""Scripts as a user runs them, in a process each, forked from one that has imported torch.

Importing torch, and what its first call imports, takes longer than most of the scripts.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["run_code", "run_script"]

ROOT = Path(__file__).resolve().parents[1]

_SERVER = """
import atexit, json, os, runpy, sys, traceback
import torch
torch.manual_seed(0)  # imports torch._dynamo
import fxqfix, torch.ao.quantization.quantize_fx

def perform(order):
    sys.argv = order["argv"]
    if "code" in order:
        exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")

for line in sys.stdin:
    order = json.loads(line)
    if not (child := os.fork()):
        for number, name in enumerate(("out", "err"), 1):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code = 0
        try:
            perform(order)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_script(path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python path arguments``, in the repository's root."""
    return _run({"argv": [path, *arguments]}, path, *arguments)


def run_code(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -c code arguments``, in the repository's root."""
    return _run({"argv": ["-c", *arguments], "code": code}, "-c", code, *arguments)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _run(order: dict[str, Any], *command: str) -> subprocess.CompletedProcess[str]:
    if not hasattr(os, "fork"):
        return subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=_environment(),
            capture_output=True,
            text=True,
        )
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("out", "err")}
        print(json.dumps(order | {n: str(p) for n, p in files.items()}), file=server.stdin)
        server.stdin.flush()
        code = int(server.stdout.readline())
        out, err = (path.read_text(encoding="utf-8") for path in files.values())
    return subprocess.CompletedProcess([sys.executable, *command], code, out, err)


@functools.cache
def _server() -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _SERVER]
    server = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdin=pipe, stdout=pipe, text=True
    )
    atexit.register(server.communicate)  # closes its stdin, which ends it
    return server
