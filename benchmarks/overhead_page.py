"""What compare_overhead.json says, as tables for docs/benchmarks.md.

python benchmarks/overhead_page.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

COUNTS = Path(__file__).with_name("compare_overhead.json")
PAGE = COUNTS.parents[1] / "docs" / "benchmarks.md"
BEGIN = "<!-- compare: written by benchmarks/compare_overhead.py -->\n"
END = "<!-- compare: end -->\n"


def page(columns: Mapping[str, Any]) -> str:
    """What stands in docs/benchmarks.md, of the JSON: a table per network, before and now."""
    now, before = columns["now"]["networks"], columns.get("today", {}).get("networks", {})
    parts = [_section(name, found, before.get(name, {})) for name, found in now.items()]
    machine = next(iter(now.values()))
    said = ", ".join(f"{key} {machine[key]}" for key in ("torch", "engine", "levels", "threads"))
    return "\n\n".join([f"Measured on {machine['date']}: {machine['cpu']}; {said}.", *parts])


def _section(name: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    rows = []
    for key, found in now.items():
        if isinstance(found, Mapping) and "batch" in found:
            old = before.get(key, {})
            cells = (found["batch"], found["first batch"], found["start, s"])
            rows.append([key, _times(old.get("batch")), *map(_times, cells[:2]), f"{cells[2]:g} s"])
    heads = ["", "batch, before", "batch", "first batch", "before it"]
    table = tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)
    forward = now["forwards, as trained"]["s"]
    lines = [
        f"**{name}**: both forwards {forward:g} s as trained, {now['forwards, frozen']['s']:g} s "
        f"frozen; convert_fx {now['convert_fx, s']:g} s.",
        table,
    ]
    if "peak, MiB" in now:
        peaks = [("now", now["peak, MiB"]), ("before", before.get("peak, MiB", {}))]
        said = (f"{who} {', '.join(f'{k} {v}' for k, v in p.items())}" for who, p in peaks if p)
        lines.append(f"Peak above what the models hold, in MiB: {'; '.join(said)}.")
    covered = (f"{tool}: {what}" for tool, what in now["coverage"].items())
    lines.append(f"Looked at: {'; '.join(covered)}; compare: every site, local and cumulative.")
    return "\n\n".join(lines)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3g}x"


def put() -> None:
    """Put the tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    found = page(json.loads(COUNTS.read_text(encoding="utf-8")))
    PAGE.write_text(f"{before}{BEGIN}\n{found}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    put()
