"""Named points at which a test holds, fails or kills a move, on either side.

    with faults.point("freeze"): ...                    in the code; also a decorator
    faults.at("freeze", after=lambda _: os.abort())     in the process of a test

A point does nothing unless a test has called `at` in this very process: neither a file, the environment, the command
line nor the other host can. It costs some microseconds.

A point is named for what it surrounds: a step of the source ("seed", "freeze", "end-source"), a line of the journal of
either side ("journal committed"), or a notification of CRIU ("criu pre-dump").
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Action = Callable[[Any], object]
_before: dict[str, Action] = {}
_after: dict[str, Action] = {}


def at(name: str, *, before: Action | None = None, after: Action | None = None) -> None:
    """Have actions called around a point. `after` is called only when what the point surrounds has not failed.

    An action takes the value that the point carries. What it raises is raised at the point.
    """
    if before is not None:
        _before[name] = before
    if after is not None:
        _after[name] = after


@contextlib.contextmanager
def point(name: str, value: object = None) -> Iterator[None]:
    """A point of a move, with a value for the actions of a test."""
    if (action := _before.get(name)) is not None:
        action(value)
    yield
    if (action := _after.get(name)) is not None:
        action(value)
