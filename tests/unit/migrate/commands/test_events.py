"""Times on the command line of `events`."""

import pytest

from migrate.commands.events import _seconds
from migrate.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5), ("500ms", 0.5), ("1m30s", 90), ("1.5h", 5400), (".5s", 0.5), ("1h2m3.5s", 3723.5), ("100us", 1e-4)],
)
def test_a_time_as_go_writes_it(text: str, seconds: float) -> None:
    assert _seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "5x", "1m30", "-5s", "0s", "5s ", "1..5s", "5 s", "99999999h"])
def test_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="must be a time such as"):
        _seconds(text)
