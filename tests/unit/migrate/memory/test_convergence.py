"""When to freeze: simulated programs that write at a constant rate, over a constant bandwidth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.memory import convergence
from migrate.memory.convergence import Round, Verdict

MIB = 1 << 20


def simulate(
    memory: float, rate: float, bandwidth: float, *, max_downtime: float = 0.3, max_rounds: int = 30
) -> tuple[Verdict, list[Round]]:
    """Run rounds until a verdict; sizes in MiB, rates in MiB/s. The program writes each page of its memory once."""
    rounds: list[Round] = []
    left = memory
    while True:
        seconds = left / bandwidth + 0.01
        sent, left = left, min(memory, rate * seconds)
        rounds.append(Round(int(sent * MIB), seconds, int(left * MIB)))
        verdict = convergence.judge(rounds, fixed=0.1, max_downtime=max_downtime, max_rounds=max_rounds)
        if verdict is not Verdict.CONTINUE:
            return verdict, rounds


@pytest.mark.parametrize("memory", [1, 16, 1024, 65536])
def test_idle_memory_takes_two_rounds(memory: int) -> None:
    verdict, rounds = simulate(memory, 0, 300)
    assert (verdict, len(rounds)) == (Verdict.SWITCH, 2)


def test_each_round_that_shortens_the_gap_is_worth_its_time() -> None:
    verdict, rounds = simulate(1024, 50, 300)
    assert verdict is Verdict.SWITCH
    assert convergence.expected_gap(rounds, 0.1) < 0.12
    assert len(rounds) < 8


def test_a_program_that_writes_as_fast_as_memory_is_sent_diverges() -> None:
    verdict, rounds = simulate(1024, 300, 300)
    assert (verdict, len(rounds)) == (Verdict.DIVERGED, 2)


def test_it_may_write_fast_if_all_it_writes_is_sent_in_time() -> None:
    assert simulate(16, 1000, 300)[0] is Verdict.SWITCH


def test_the_number_of_rounds_is_bounded() -> None:
    verdict, rounds = simulate(4096, 200, 300, max_downtime=0.11, max_rounds=3)
    assert (verdict, len(rounds)) == (Verdict.DIVERGED, 3)


@given(st.floats(0.1, 1e5), st.floats(0, 2000), st.floats(1, 2000), st.floats(0.05, 5), st.integers(2, 50))
def test_it_always_ends_and_keeps_the_limit_when_it_says_so(
    memory: float, rate: float, bandwidth: float, max_downtime: float, max_rounds: int
) -> None:
    verdict, rounds = simulate(memory, rate, bandwidth, max_downtime=max_downtime, max_rounds=max_rounds)
    assert 2 <= len(rounds) <= max_rounds
    if verdict is Verdict.SWITCH:
        assert convergence.expected_gap(rounds, 0.1) <= max_downtime


def test_rounds_do_not_help_against_a_fixed_part_that_is_too_long() -> None:
    rounds = [Round(256 * MIB, 1.0, 20 * MIB), Round(20 * MIB, 0.1, 2 * MIB), Round(2 * MIB, 0.03, MIB // 2)]
    judge = convergence.judge
    assert judge(rounds, fixed=1.0, max_downtime=0.3, max_rounds=30) is Verdict.OUT_OF_REACH
    assert judge(rounds, fixed=0.2, max_downtime=0.3, max_rounds=30) is Verdict.SWITCH
    # What is left takes longer than the fixed part: the program writes too fast all the same.
    rounds = [Round(256 * MIB, 1.0, 256 * MIB), Round(256 * MIB, 1.0, 250 * MIB)]
    assert judge(rounds, fixed=0.4, max_downtime=0.3, max_rounds=30) is Verdict.DIVERGED


def test_a_bandwidth_limit_does_not_count_in_the_freeze() -> None:
    rounds = [Round(100 * MIB, 10.0, 100 * MIB, 9.0), Round(100 * MIB, 10.0, 100 * MIB, 9.0)]
    assert convergence.expected_gap(rounds, 0.1) == pytest.approx(1.1)


def test_nothing_was_sent() -> None:
    rounds = [Round(0, 0.0, 0), Round(0, 0.0, 0)]
    assert convergence.judge(rounds, fixed=0.1, max_downtime=0.3, max_rounds=30) is Verdict.SWITCH
