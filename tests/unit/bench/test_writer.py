"""What a benchmark's program says, and what is counted of its hosts."""

import os
from pathlib import Path

import pytest

from tests.bench import options, usage, writer

TEXT = "ready\nsomething else\ngap 100.000000 0.030000\ngap 101.5 2.25\ngap 103.75 0.040000\ngap 120.0 0.5\nbad 2\n"


def test_the_longest_gap_and_the_others_around_it() -> None:
    seen = writer.parse(TEXT)
    gap = seen.longest(99.0)
    assert (seen.ready, seen.bad, seen.checked) == (True, 2, False)
    assert (gap.start, gap.end) == (101.5, 103.75)
    assert seen.sum(99.0, gap.start) == pytest.approx(0.03)
    assert seen.sum(gap.end, gap.end + 10) == pytest.approx(0.04)


def test_a_gap_before_the_move_is_not_its_gap() -> None:
    seen = writer.parse("gap 10.0 5.0\ngap 101.0 0.1\n")
    assert seen.longest(100.0).long == 0.1
    with pytest.raises(ValueError, match="it was not moved"):
        seen.longest(102.0)


def test_a_line_that_is_not_finished_counts_for_nothing() -> None:
    assert writer.parse("ready\nchecked 1") == writer.Seen(True, (), 0, False)
    assert writer.parse("ready\nchecked 1\n") == writer.Seen(True, (), 1, True)


def test_counters_of_both_versions_of_cgroups(tmp_path: Path) -> None:
    files = {
        "one/cpuacct.usage": "2500000000\n", "two/memory.usage_in_bytes": "4096\n",
        "two/memory.max_usage_in_bytes": "8192\n", "unified/cpu.stat": "usage_usec 1500000\nuser_usec 1\n",
        "unified/memory.current": "1\n", "unified/memory.peak": "3\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    first = usage.Groups((str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "unified")))
    second = usage.Groups((str(tmp_path / "unified"),))
    none = usage.Groups((str(tmp_path / "none"),))
    assert [groups.cpu() for groups in (first, second, none)] == [2.5, 1.5, None]
    assert [groups.memory() for groups in (first, second, none)] == [4096, 1, None]
    descriptors = os.listdir("/proc/self/fd")
    peaks = [groups.peak() for groups in (first, second, none)]
    (tmp_path / "two/memory.max_usage_in_bytes").write_text("9000\n")
    assert [peak.bytes() for peak in peaks] == [9000, 0, None]
    for peak in peaks:
        peak.close()
    assert os.listdir("/proc/self/fd") == descriptors


def test_the_command_line_has_every_default() -> None:
    full, quick = options.parse(None, []), options.parse(None, ["--quick"])
    assert (full.rounds, full.memory, full.dirty) == (5, [16, 256, 1024, 4096], [0.0, 50.0])
    assert full.links == ["unshaped", "1g", "100m"]
    assert (quick.rounds, quick.memory, quick.links) == (1, [16, 256], ["unshaped"])
    assert [way.key for way in options.parse(None, ["--only", "ours,one"]).ways] == ["ours", "one"]


@pytest.mark.parametrize(
    "argv", [["-n", "0"], ["--memory", "1,x"], ["--only", "podman"], ["-o", "/none"], ["--memory", "0"]]
)
def test_bad_wishes_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        options.parse(None, argv)
    assert refused.value.code == 2
    assert "error:" in capsys.readouterr().err
