"""Golden texts: what a rendering looked like when someone last read it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    with suppress(ValueError):  # tests/conftest.py may offer it already
        parser.addoption(
            "--update-golden",
            action="store_true",
            help="write the golden texts anew; then read them",
        )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Assert that a text is the one in tests/golden/<name>.txt."""
    update = request.config.getoption("--update-golden", default=False)

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        # Padding at the end of a line is invisible, and editors remove it from the file.
        text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
        if update:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), (
            f"read it, then pytest {request.node.nodeid} --update-golden"
        )

    return check
