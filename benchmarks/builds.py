"""The test suite against another build of torch: what passes, what is skipped and why.

python benchmarks/builds.py --python python3.12 --torch 2.11.0     a build, as PyPI ships it
python benchmarks/builds.py --venv DIR -- tests/engines -k linear  an environment that is there
python benchmarks/builds.py --table                                the page anew

Makes an environment beside this checkout (.builds/), installs torch and what the tests need; each
extra that can be installed without another torch comes too, the rest is named. The suite runs on
the CPU, and what it gives is kept in benchmarks/builds.json, a record for each torch and Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "builds.json"
PAGE = ROOT / "docs" / "builds.md"
BASE = ("pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "tabulate", "networkx", "numpy")
# Extra of pyproject.toml -> what it installs.
EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "pt2e": ("torchao",),
    "executorch": ("executorch",),
    "tensorboard": ("tensorboard",),
    "export": ("safetensors",),
    "examples": ("scikit-learn",),
    "pandas": ("pandas",),
    "plot": ("matplotlib",),
    "progress": ("tqdm",),
}
# What an extra is worth nothing without, asked in the environment.
NEEDED = {"pt2e": "torchao.testing.pt2e._xnnpack_quantizer", "executorch": "executorch.runtime"}
ASK = """
import importlib, json, platform, sys, warnings
warnings.simplefilter("ignore")
import torch
def there(name):
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}".split(chr(10))[0][:120]
    return ""
print(json.dumps({
    "torch": torch.__version__,
    "python": platform.python_version(),
    "cpu": torch.backends.cpu.get_cpu_capability(),
    "engines": sorted(set(torch.backends.quantized.supported_engines) - {"none"}),
    "lacks": {name: there(name) for name in sys.argv[1:]},
}))
"""


def main() -> int:
    options = _options()
    if not options.table:
        python = _environment(options)
        record = _record(python, options.tests)
        _keep(record)
        print(f"{record['torch']}, Python {record['python']}: {record['counts']}")
    PAGE.write_text(page(), encoding="utf-8")
    return 0 if options.table else int(bool(record["failed"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter to make it from")
    parser.add_argument("--torch", help="release of torch; the newest where it is left out")
    parser.add_argument("--venv", type=Path, help="an environment that is there already")
    parser.add_argument("--table", action="store_true", help="only write the page anew")
    parser.add_argument("tests", nargs="*", help="what pytest is given; all tests by default")
    return parser.parse_args()


# ---------------------------------------------------------------- the environment


def _environment(options: argparse.Namespace) -> Path:
    """The interpreter of an environment with torch, the tests' tools and the extras."""
    if options.venv is not None:
        return Path(options.venv) / "bin" / "python"
    wanted = f"torch=={options.torch}" if options.torch else "torch"
    folder = ROOT / ".builds" / f"{wanted.replace('==', '-')}-{Path(options.python).name}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([options.python, "-m", "venv", str(folder)], check=True)
    _install(python, wanted, *BASE)
    _install(python, "--no-deps", "--editable", str(ROOT))
    build = json.loads(_out(python, "-c", ASK))["torch"].partition("+")[0]
    for name, packages in EXTRAS.items():
        if not _install(python, f"torch=={build}", *packages, check=False):
            print(f"{name}: not for torch {build}")
        elif reason := _unusable(python, NEEDED.get(name, "")):
            print(f"{name}: {reason}")
            command = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *packages]
            subprocess.run(command, check=True)
    return python


def _unusable(python: Path, module: str) -> str:
    """Why what an extra installs is of no use with this torch; "" if it is."""
    command = [str(python), "-W", "ignore", "-c", f"import torch; import {module}"]
    found = subprocess.run(command, capture_output=True, text=True) if module else None
    return found.stderr.strip().splitlines()[-1] if found and found.returncode else ""


def _install(python: Path, *packages: str, check: bool = True) -> bool:
    command = [str(python), "-m", "pip", "install", "--quiet", *packages]
    return subprocess.run(command, check=check).returncode == 0


def _out(python: Path, *arguments: str) -> str:
    command = [str(python), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---------------------------------------------------------------- a run


def _record(python: Path, tests: list[str]) -> dict[str, Any]:
    """What the suite gives in an environment."""
    modules = {NEEDED.get(name, packages[0]): name for name, packages in EXTRAS.items()}
    modules["sklearn"] = modules.pop("scikit-learn")
    about = json.loads(_out(python, "-c", ASK, *modules))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command += [f"--junitxml={report}", *tests]
        subprocess.run(command, check=False, cwd=ROOT, env=environment)
        found = _read(report)
    lacks = {modules[name]: reason for name, reason in about.pop("lacks").items() if reason}
    return {**about, "part": " ".join(tests), "lacks": lacks, **found}


def _read(report: Path) -> dict[str, Any]:
    """Counts, the failing tests, and how many tests each reason skips."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failed = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag: child for child in case}
        kind = next((k for k in ("error", "failure", "skipped") if k in kinds), "passed")
        counts[kind] += 1
        if kind == "skipped":
            reasons[_reason(kinds["skipped"].get("message", ""))] += 1
        elif kind != "passed":
            failed.append(f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}")
    return {"counts": dict(counts), "failed": failed, "skipped": dict(reasons.most_common())}


def _reason(message: str) -> str:
    """One reason for what differs only in a place."""
    return re.sub(r"\S*/(?=[\w.]+:\d+)|:\d+(?=:)", "", message).strip()[:160]


def _keep(record: dict[str, Any]) -> None:
    known = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else []
    key = ("torch", "python", "part")
    others = [r for r in known if [r[k] for k in key] != [record[k] for k in key]]
    ordered = sorted([*others, record], key=_order)
    RECORDS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def _order(record: dict[str, Any]) -> tuple[Any, ...]:
    return [int(n) for n in re.findall(r"\d+", record["torch"])], record["python"], record["part"]


# ---------------------------------------------------------------- the page


def page() -> str:
    """docs/builds.md: a row per build, then what each leaves out, by name."""
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    lines = [
        "# Builds of torch",
        "<!-- Written by benchmarks/builds.py from benchmarks/builds.json: run it again. -->",
        "",
        "The same suite against builds of torch as PyPI ships them, on the CPU. Kernels differ "
        "between builds; which formula one follows is asked of the kernel, never read off a "
        "version. What a build's kernel does that nobody has measured is refused, by name.",
        "",
        "| torch | Python | ATen | tests | passed | failed | skipped | extras it lacks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in records:
        counts = Counter(r["counts"])
        bad = counts["failure"] + counts["error"]
        lacks = ", ".join(r["lacks"]) or "none"
        cells = [r["torch"], r["python"], r["cpu"], r["part"] or "all"]
        cells += [f"{counts['passed']:,}", f"{bad:,}", f"{counts['skipped']:,}", lacks]
        lines.append(f"| {' | '.join(cells)} |")
    for r in records:
        title = f"torch {r['torch']}, Python {r['python']}" + f", {r['part']}" * bool(r["part"])
        lines += ["", f"## {title}", ""]
        lines += [f"- extra `{name}`: {reason}" for name, reason in r["lacks"].items()]
        lines += [f"- failed: `{name}`" for name in r["failed"]]
        lines += [f"- {count} skipped: {reason}" for reason, count in r["skipped"].items()]
    return "\n".join(line.rstrip() for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
