"""LintReport: what the checks found in a prepared model, as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fxqfix._notebook import Shown
from fxqfix.checks import SEVERITIES, Finding
from fxqfix.errors import counting
from fxqfix.names import Severity
from fxqfix.report import text

__all__ = ["LintReport"]

_HEADERS = ("severity", "code", "site", "evidence", "remedy")
_SHOWN = 3  # findings of one code that are listed, unless all are asked for


@dataclass(frozen=True)
class LintReport(Shown):
    """What lint found.

    Attributes:
        findings: All findings, errors first.
        engine: The engine that conversion is judged for.
        sites: How many sites were read.

    Example:
        >>> from fxqfix import LintReport
        >>> LintReport((), "fbgemm", 3).ok
        True
    """

    findings: tuple[Finding, ...]
    engine: str = ""
    sites: int = 0

    @property
    def ok(self) -> bool:
        """True where no finding is an error."""
        return not self.of("error")

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of one severity: "error", "warning" or "info"."""
        return tuple(f for f in self.findings if f.severity == severity)

    def table(self, fmt: str = "simple", limit: int | None = None) -> str:
        """Render the findings in any tabulate format.

        Args:
            fmt: A format of tabulate.
            limit: Findings of one code and severity to show; None shows all.
        """
        if limit is not None:
            counting(limit, "LintReport.table", "limit counts findings")
        seen: Counter[tuple[str, str]] = Counter()
        lines = []
        for found in self.findings:
            seen[found.severity, found.code] += 1
            if limit is None or seen[found.severity, found.code] <= limit:
                cells = (found.severity, found.code, found.site or "-")
                lines.append((*cells, found.evidence, found.remedy))
        return text.listing(_HEADERS, lines, fmt)

    def __str__(self) -> str:
        # "info" has no plural.
        counts = ", ".join(
            f"{len(self.of(s))} {s}{'s' * (len(self.of(s)) != 1 and s != 'info')}"
            for s in SEVERITIES
        )
        sites = f"{self.sites} site{'s' * (self.sites != 1)}"
        title = f"fxqfix lint: engine {self.engine}, {sites}: {counts}"
        if not self.findings:
            return f"{title}\nnothing found"
        counted = Counter((f.severity, f.code) for f in self.findings)
        more = Counter[str]()
        for (_, code), count in counted.items():
            more[code] += max(count - _SHOWN, 0)
        left = [f"{count} more {code}" for code, count in more.items() if count]
        tail = [f"not listed: {', '.join(left)}; see .findings or .table()"] if left else []
        return "\n\n".join([title, self.table(limit=_SHOWN), *tail])
