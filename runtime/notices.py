"""What a user should know though nothing has failed."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def _to_stderr(text: str) -> None:
    os.write(2, f"pymigrate: warning: {text}\n".encode(errors="backslashreplace"))


show: Callable[[str], None] = _to_stderr  # the command line puts its own in this place


def say(text: str) -> None:
    """A line for who is at the terminal, on stderr."""
    os.write(2, f"\n{text}\n".encode(errors="backslashreplace"))


def warn(text: str) -> None:
    """Show a warning: a sentence as errors have it."""
    show(text)
