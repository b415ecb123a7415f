"""The command line of `move` and `validate`."""

import argparse

import pytest

from migrate.cli import move_arguments


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e9", "x", ""])
def test_a_time_that_no_container_may_be_frozen(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        move_arguments.seconds(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1024", 1024), ("1K", 1024), ("500k", 512_000), ("50M", 50 << 20), ("1.5G", 3 << 29), ("1024G", 1 << 40)],
)
def test_a_rate_is_bytes_per_second_in_powers_of_1024(text: str, expected: int) -> None:
    assert move_arguments.rate(text) == expected


@pytest.mark.parametrize("text", ["0", "0M", "1023", "0.9K", "1025G", "9" * 15 + "G"])
def test_a_rate_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be between 1K and 1024G"):
        move_arguments.rate(text)


@pytest.mark.parametrize("text", ["", "-5M", "50MiB", "50 M", "1e9", "nan", "inf", "M", "1.M", "50M/s", "9" * 16])
def test_a_malformed_rate_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be bytes per second, such as"):
        move_arguments.rate(text)
