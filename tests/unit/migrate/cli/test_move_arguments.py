"""The command line of `move` and `validate`."""

import argparse

import pytest

from migrate.cli import move_arguments


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e9", "x", ""])
def test_a_time_that_no_container_may_be_frozen(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        move_arguments.seconds(text)
