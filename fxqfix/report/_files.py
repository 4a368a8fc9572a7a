"""Files of results: written beside their place, then renamed, so that none is ever half there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fxqfix.errors import WriteError

__all__ = ["save"]


def save(text: str, path: str | os.PathLike[str] | None, where: str) -> str:
    """Write text to a file, if a path is given.

    What was there stays until all of the new text is on the disk. Of a link its target is
    written; of a pipe or a terminal there is nothing to rename.

    Args:
        text: What to write, as UTF-8.
        path: Where to; None writes nothing.
        where: The call, for the message.

    Returns:
        The text.

    Raises:
        WriteError: The path can't be written.
    """
    if path is None:
        return text
    target = Path(os.path.realpath(path))
    special = target.exists() and not target.is_file() and not target.is_dir()
    part = target if special else target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        if not special:
            part.replace(target)
    except OSError as error:
        with suppress(OSError):
            if not special:
                part.unlink(missing_ok=True)
        raise WriteError(
            "the file can't be written",
            where=where,
            found=f"{os.fspath(path)}: {error.strerror}",
            expected="a path in a folder that exists and can be written to",
        ) from error
    return text
