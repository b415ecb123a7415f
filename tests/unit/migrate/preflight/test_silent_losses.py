"""What only some processors offer, by what kernels on them say: this machine's may have none of it."""

import os
import subprocess
import threading
import time

import pytest

from migrate.preflight import limits, silent_losses

MAPPING = """{range} {flags} 00000000 00:00 0 {name}
Size:                  4 kB
Pss:                   0 kB
ProtectionKey:  {key:>8}
VmFlags: rd wr mr mw me ac
"""


def smaps(*mappings: tuple[str, int]) -> str:
    return "".join(
        MAPPING.format(range=f"7f00000{number}000-7f00000{number}1000", flags=flags, name="", key=key)
        for number, (flags, key) in enumerate(mappings, 1)
    )


def test_memory_with_a_protection_key() -> None:
    assert silent_losses.protected_by_key(smaps(("rw-p", 0), ("rw-p", 3), ("rw-p", 1))) == "7f000002000"
    assert silent_losses.protected_by_key(smaps(("--xp", 1), ("rw-p", 12))) == "7f000002000"


def test_memory_without_one() -> None:
    """Memory that may only be executed has a key of the kernel's; a processor without keys shows no such line."""
    assert silent_losses.protected_by_key(smaps(("rw-p", 0), ("--xp", 1))) == ""
    assert silent_losses.protected_by_key("7f0000001000-7f0000002000 rw-p 00000000 00:00 0\nSize: 4 kB\n") == ""
    assert silent_losses.protected_by_key("") == ""


# (Documentation/userspace-api/spec_ctrl.rst and fs/proc/array.c have the words.)
@pytest.mark.parametrize(
    ("bypass", "branch", "found"),
    [
        ("thread vulnerable", "conditional enabled", ""),
        ("not vulnerable", "not affected", ""),
        ("globally mitigated", "always disabled", ""),
        ("vulnerable", "unsupported", ""),
        ("thread mitigated", "conditional enabled", "Speculation_Store_Bypass: thread mitigated"),
        ("thread force mitigated", "always enabled", "Speculation_Store_Bypass: thread force mitigated"),
        ("thread vulnerable", "conditional disabled", "SpeculationIndirectBranch: conditional disabled"),
        ("unknown", "conditional force disabled", "SpeculationIndirectBranch: conditional force disabled"),
    ],
)
def test_restricted_speculation(bypass: str, branch: str, found: str) -> None:
    status = f"Name:\tx\nSeccomp:\t0\nSpeculation_Store_Bypass:\t{bypass}\nSpeculationIndirectBranch:\t{branch}\n"
    assert silent_losses.speculation(status, "Mitigation: Speculative Store Bypass disabled via prctl") == found


def test_speculation_that_a_seccomp_filter_restricts() -> None:
    """Before Linux 5.16 each filter does: it is carried, and does so again."""
    status = "Seccomp:\t2\nSpeculation_Store_Bypass:\tthread force mitigated\n"
    text = "Mitigation: Speculative Store Bypass disabled via prctl"
    assert silent_losses.speculation(status, f"{text} and seccomp") == ""
    assert silent_losses.speculation(status, text) == "Speculation_Store_Bypass: thread force mitigated"


def test_inheritable_capabilities() -> None:
    text = "CapInh:\t{:016x}\nCapPrm:\t000001ffffffffff\nCapBnd:\t{:016x}\n"
    assert silent_losses.inheritable_beyond_bounding(text.format(0x2000001, 0x1FF)) == "CAP_SYS_TIME"
    assert silent_losses.inheritable_beyond_bounding(text.format(0x1FF, 0x1FF)) == ""
    assert silent_losses.inheritable_beyond_bounding("") == ""


def test_a_kernel_that_says_nothing() -> None:
    assert silent_losses.speculation("Name:\tx\n", "") == ""


def test_a_thread_that_ends_while_it_is_looked_at_is_in_no_other_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for one with a cgroup of its own, when nothing was to be read of it any longer."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    found = os.sched_getscheduler

    def ended(number: int) -> int:
        policy = found(number)
        if number == thread.native_id:
            end.set()
            thread.join()
            while os.path.exists(f"/proc/self/task/{number}"):
                time.sleep(0.001)
        return policy

    monkeypatch.setattr(os, "sched_getscheduler", ended)
    rules = [blocker.rule for blocker in silent_losses.of_process(os.getpid(), os.getpid(), "this")]
    assert end.is_set()
    assert "threaded-cgroup" not in rules


def test_a_process_that_has_ended_breaks_no_rule() -> None:
    """Those of a container begin and end while they are looked at."""
    with subprocess.Popen(["true"]) as ended:
        pass
    assert list(silent_losses.of_process(ended.pid, os.getpid(), "process")) == []
    assert limits.lacking(ended.pid, "host2", ()) == []
