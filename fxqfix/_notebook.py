"""What a notebook shows of a record: its text where it has one, else its fields as a table."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from html import escape

__all__ = ["Shown"]

_MOST = 400  # characters of one field


class Shown:
    """A record that notebooks show.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Pair(Shown):
        ...     name: str
        >>> "a &lt; b" in Pair("a < b")._repr_html_()
        True
    """

    __slots__ = ()

    def _repr_html_(self) -> str:
        """HTML for a notebook; nothing in it is run."""
        if is_dataclass(self) and type(self).__str__ is object.__str__:
            named = ((f.name, getattr(self, f.name)) for f in fields(self) if f.repr)
            lines = "".join(
                f'<tr><th style="text-align: left">{name}</th>'
                f'<td style="text-align: left">{escape(_brief(value))}</td></tr>'
                for name, value in named
            )
            return f"<table><caption>{type(self).__name__}</caption>{lines}</table>"
        return f'<pre style="overflow-x: auto; line-height: 1.3">{escape(str(self))}</pre>'


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"
