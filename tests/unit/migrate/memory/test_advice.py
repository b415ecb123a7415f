"""What a plan says about the largest part of the gap."""

import pytest

from migrate.memory import advice, forecast
from migrate.memory.convergence import Round, Verdict
from migrate.memory.forecast import Load, Run

MIB = 1 << 20
LOAD = Load(4 << 30, 300, 0.02, shared=1 << 28)


def run(name: str, seconds: float = 0.5, verdict: Verdict = Verdict.SWITCH) -> Run:
    return Run(
        verdict, (Round(1, 1.0, 0),), LOAD.parts() | {forecast.BASE: 0.09, forecast.PROCESSES: 0.0, name: seconds}
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (forecast.BASE, "nothing can that the container decides"),
        (forecast.PROCESSES, "half the processes: 300"),
        (forecast.PINNED, "CRIU pins 4.0 GiB"),
        (forecast.ROUND_TRIPS, "a round trip takes 20.0 ms"),
        (forecast.EAGER, "the restore waits for all of it, because why"),
        (forecast.SHARED, "half the shared memory: freeze and restore copy 0.2 GiB"),
        (forecast.LAST_PAGES, "a connection twice as fast, or a program that writes half as much"),
        (forecast.ALL_PAGES, "this memory is sent in the freeze, because why"),
    ],
)
def test_each_part_has_its_advice(name: str, words: str) -> None:
    found = run(name)
    assert advice.dominant(found) == name
    assert words in advice.advice(found, LOAD, rate=MIB, bandwidth=MIB, reason="why")


def test_every_part_of_a_run_has_advice() -> None:
    load = Load(1 << 30, 1, 0.001, eager=True)
    parts = forecast.simulate(load, forecast.Written((), 1), 1, 1.0, forecast.Aim(0.3, 30)).parts
    for name in parts:
        assert advice.advice(run(name, 10.0), load, rate=0.0, bandwidth=1.0)


@pytest.mark.parametrize(("gap", "limit"), [(0.62, "0.7"), (0.31, "0.4"), (5.0, "6")])
def test_memory_that_is_written_too_fast(gap: float, limit: str) -> None:
    found = Run(Verdict.DIVERGED, (Round(1, 1.0, 0),), {forecast.LAST_PAGES: gap})
    words = advice.advice(found, LOAD, rate=50 * MIB, bandwidth=30 * MIB)
    assert words.startswith("memory is written too fast (50 MiB/s, and 30 MiB/s are sent): a faster connection")
    assert words.endswith(f"--max-downtime {limit}")
