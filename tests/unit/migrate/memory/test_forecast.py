"""Predictions: what earlier moves teach, and simulated rounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.memory import forecast
from migrate.memory.convergence import Verdict
from migrate.memory.forecast import Aim, Load, Past, Scale, Written, simulate

MIB, GIB = 1 << 20, 1 << 30
SMALL = Load(16 * MIB, 2)
AIM = Aim(0.3, 30)


def move(ratio: float, target: str = "host2", load: Load = SMALL) -> Past:
    """A move whose fixed part took `ratio` times what the model says."""
    return Past(target, load, ratio * load.fixed(), 0.5)


def test_the_model_grows_with_what_it_depends_on() -> None:
    small = SMALL.fixed()
    assert small == pytest.approx(0.097, abs=0.005)
    for larger in (Load(4 * GIB, 2), Load(16 * MIB, 200), Load(16 * MIB, 2, 0.02)):
        assert larger.fixed() > small + 0.1
    assert Load(GIB, 2, eager=True).fixed() > Load(GIB, 2).fixed() + 1


def test_the_median_of_earlier_moves_corrects_the_model() -> None:
    assert forecast.scale([]) == Scale(1.0, 0.75, 1.25)
    # One that took a hundred times as long, because the machine was busy, changes nothing.
    learned = forecast.scale([move(2.0), move(2.1), move(1.9), move(100.0), move(2.0)])
    assert learned.middle == 2.0
    assert 1.7 < learned.low < 2.0 < learned.high < 2.3


@given(st.lists(st.floats(0, 1e6), max_size=12))
def test_a_scale_is_bounded_and_in_its_own_range(ratios: list[float]) -> None:
    found = forecast.scale([move(ratio) for ratio in ratios])
    assert 0 < found.low <= found.middle <= found.high <= 25


def learned(past: list[Past], load: Load = SMALL) -> float:
    return forecast.scale(forecast.like(past, "host2", load)).middle


def test_moves_to_the_same_host_say_more_if_they_are_enough() -> None:
    others = [move(1.0, "far")] * 7
    assert learned([move(3.0)] * 3 + others) == 3.0
    assert learned([move(3.0)] * 2 + others) == 1.0


def test_moves_that_are_alike_say_more() -> None:
    large, eager = Load(GIB, 2), Load(GIB, 2, eager=True)
    past = [move(1.0), move(2.0, load=large), move(4.0, load=eager)] * 5
    assert (learned(past), learned(past, large), learned(past, eager)) == (1.0, 2.0, 4.0)
    assert learned([move(1.0)] * 5 + [move(2.0, load=large)] * 2, large) == 1.0
    assert learned([move(1.0, "far")] * 5 + [move(2.0, "far", large)] * 3, large) == 2.0


def test_only_the_newest_moves_count() -> None:
    assert learned([move(1.0)] * 10 + [move(5.0)] * 50) == 1.0


def test_what_is_written_grows_between_the_points_and_up_to_all_memory() -> None:
    written = Written(((0.25, 10 * MIB), (0.5, 20 * MIB), (1.0, 30 * MIB), (2.0, 40 * MIB)), 100 * MIB)
    assert written.after(0.125) == 5 * MIB
    assert written.after(0.75) == 25 * MIB
    assert written.after(4.0) == 60 * MIB
    assert written.after(60.0) == 100 * MIB
    assert written.rate == 30 * MIB
    assert Written((), 100).after(5.0) == 0


def steady(rate: float, memory: int = GIB) -> Written:
    """A program that writes `rate` MiB/s of memory, all of it in turn."""
    return Written(tuple((at, min(memory, int(rate * MIB * at))) for at in (0.25, 0.5, 1.0, 2.0)), memory)


def test_shared_memory_is_sent_once_and_makes_the_fixed_part_longer() -> None:
    run = simulate(Load(GIB, 2, shared=GIB), steady(0), 0, 300 * MIB, AIM)
    assert (len(run.rounds), run.size) == (2, 2 * GIB)
    assert run.gap == pytest.approx(Load(GIB, 2).fixed() + run.parts[forecast.SHARED])
    assert forecast.SHARED not in Load(GIB, 2).parts()


def test_idle_memory_takes_two_rounds_and_the_fixed_part() -> None:
    run = simulate(Load(GIB, 2), steady(0), 0, 300 * MIB, AIM)
    assert (run.verdict, len(run.rounds)) == (Verdict.SWITCH, 2)
    assert run.gap == pytest.approx(Load(GIB, 2).fixed())
    assert run.size == GIB
    assert run.seconds == pytest.approx(GIB / (300 * MIB) + 0.04 + run.gap)


def test_a_working_set_that_fits_does_not_diverge_however_fast_it_is_written() -> None:
    points = tuple((at, 8 * MIB) for at in (0.25, 0.5, 1.0, 2.0))
    run = simulate(Load(GIB, 2), Written(points, GIB), 0, 300 * MIB, AIM)
    assert run.verdict is Verdict.SWITCH
    assert run.parts[forecast.LAST_PAGES] < 0.03


def test_a_slow_link_diverges_and_the_last_pages_are_the_largest_part() -> None:
    run = simulate(Load(GIB, 2), steady(50), 0, 30 * MIB, AIM)
    assert run.verdict is Verdict.DIVERGED
    assert max(run.parts, key=run.parts.__getitem__) == forecast.LAST_PAGES
    assert run.gap > 10


def test_without_rounds_all_memory_goes_in_the_freeze() -> None:
    run = simulate(Load(GIB, 2), None, GIB, 256 * MIB, AIM)
    assert run.rounds == ()
    assert run.parts[forecast.ALL_PAGES] == 4.0


def test_doubt_widens_a_prediction() -> None:
    low, middle, high = (simulate(Load(GIB, 2), steady(100), 0, 300 * MIB, AIM, s, s) for s in (0.75, 1.0, 1.25))
    assert low.gap < middle.gap < high.gap


@given(st.floats(0, 1e4), st.floats(0, 1e10), st.floats(0.01, 5), st.integers(2, 40))
def test_a_simulation_ends(rate: float, bandwidth: float, max_downtime: float, max_rounds: int) -> None:
    run = simulate(SMALL, steady(rate, 16 * MIB), 0, bandwidth, Aim(max_downtime, max_rounds))
    assert 2 <= len(run.rounds) <= max_rounds
    if run.verdict is Verdict.SWITCH:
        assert run.gap <= max_downtime + 1e-9
