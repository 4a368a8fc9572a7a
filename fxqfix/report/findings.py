"""What a report says besides its table, in sentences: kernels, culprits, problems."""

from __future__ import annotations

from collections.abc import Sequence

from fxqfix.report.data import Report

__all__ = ["counted", "culprits", "kernels", "problems"]


def kernels(report: Report) -> list[str]:
    """What is known of the kernels without any data: where they run, how far their sums may go.

    Example:
        >>> kernels(Report(rows=()))
        []
    """
    lines = []
    others = [row for row in report.rows if row.engine not in ("", report.engine)]
    for engine in dict.fromkeys(row.engine for row in others):
        names = [row.name for row in others if row.engine == engine]
        lines.append(f"on {engine}: {_some(names)}")
    sums = [row for row in report.rows if row.accumulator is not None]
    if sums:
        largest = max(sums, key=lambda row: row.accumulator or 0)
        lines.append(
            f"largest possible accumulator in {counted(len(sums), 'op')}: {largest.accumulator} "
            f"({largest.name}); int32 limit {2**31 - 1}"
        )
    hot = {row.name: row.saturation for row in report.rows if row.saturation}
    if hot:
        listed = [f"{name} ({counted(count, 'pair')} of weights)" for name, count in hot.items()]
        lines.append(f"int16 saturation is possible on CPUs without VNNI: {_some(listed)}")
    return lines


def culprits(report: Report) -> list[str]:
    """What correcting each culprit alone does.

    Example:
        >>> culprits(Report(rows=()))
        []
    """
    return [str(culprit) for culprit in report.corrected or ()]


def problems(report: Report) -> list[str]:
    """What could not be computed, site by site.

    Example:
        >>> problems(Report(rows=()))
        []
    """
    return [f"{row.name}: {problem}" for row in report.rows for problem in row.problems]


def _some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def counted(count: int, noun: str, ending: str = "s") -> str:
    """A number and its noun, which gets an ending where there is not one of it.

    Example:
        >>> counted(1, "row"), counted(2, "batch", "es")
        ('1 row', '2 batches')
    """
    return f"{count} {noun}{'' if count == 1 else ending}"
