"""Tell the user what matters although nothing has failed."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def _to_stderr(text: str) -> None:
    os.write(2, f"pymigrate: warning: {text}\n".encode(errors="backslashreplace"))


show: Callable[[str], None] = _to_stderr  # the command line replaces it


def say(text: str) -> None:
    """Show a line on stderr, for the user at the terminal."""
    os.write(2, f"\n{text}\n".encode(errors="backslashreplace"))


def warn(text: str) -> None:
    """Show a warning, worded like an error message."""
    show(text)
