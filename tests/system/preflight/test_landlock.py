"""Landlock is lost by a move; what may have it is named, and nothing else is."""

import json
import platform
import struct
import time
from pathlib import Path

import pytest

from runtime.linux import syscalls
from runtime.spec.default import default_spec
from tests.support.boxes import PATIENCE, make
from tests.support.hosts import COUNT
from tests.system.conftest import Lab, Local

NNP = f"setpriv --nnp sh -c '{COUNT}'"
# prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); landlock_create_ruleset({1 << 1}, 8, 0); landlock_restrict_self(fd, 0);
# close(3); write(1, "1\n", 2), or exit(1) when the one before has failed; then pause() for ever.
CODE = bytes.fromhex(
    "b89d000000 bf26000000 be01000000 31d2 4d31d2 4d31c0 0f05"
    "6a02 b8bc010000 4889e7 be08000000 31d2 0f05"
    "89c7 b8be010000 31f6 0f05 85c0 752e"
    "b803000000 bf03000000 0f05"
    "68310a0000 b801000000 bf01000000 4889e6 ba02000000 0f05"
    "b822000000 0f05 ebf7"
    "b83c000000 bf01000000 0f05"
)


def elf(code: bytes) -> bytes:
    """A static x86-64 program."""
    base = 0x400000
    head = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    )
    size = 120 + len(code)
    return head + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096) + code


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if not syscalls.landlock_version():
        pytest.skip("the kernel has no Landlock")


def warnings(pymigrate: Local) -> list[str]:
    done = pymigrate("--json", "validate", "c", check=False)
    found: list[str] = json.loads(done.stdout)["warnings"]
    return found


def wait_output(pymigrate: Local) -> None:
    deadline = time.monotonic() + PATIENCE
    while not pymigrate("logs", "c").stdout:
        assert time.monotonic() < deadline, "the program does not begin"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the program is for x86-64")
def test_a_program_that_confines_itself_is_named(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "exec /confined")
    (bundle / "rootfs" / "confined").write_bytes(elf(CODE))
    (bundle / "rootfs" / "confined").chmod(0o755)
    pymigrate("run", "-d", "-b", bundle, "c")
    wait_output(pymigrate)
    (words,) = warnings(pymigrate)
    assert "(confined), as /confined can" in words
    assert "warning: container c: Landlock is not carried" in pymigrate("validate", "c", check=False).stderr
    done = pymigrate("snapshot", "save", "c", tmp_path / "snap", "--allow", "writable-rootfs")
    assert "Landlock is not carried" in done.stderr


@pytest.mark.parametrize(
    ("asked", "script", "suspected"), [(True, COUNT, False), (False, COUNT, False), (False, NNP, True)]
)
def test_no_other_is_named_without_a_reason(
    pymigrate: Local, tmp_path: Path, asked: bool, script: str, suspected: bool
) -> None:
    """With no-new-privileges by config.json each program has it; one that sets it itself may have done more."""
    fields = {"process.noNewPrivileges": asked}
    pymigrate("run", "-d", "-b", make(tmp_path / "b", script, fields), "c")
    wait_output(pymigrate)
    assert [("which has set no-new-privileges itself" in words) for words in warnings(pymigrate)] == [True] * suspected


def test_a_move_says_so_once(lab: Lab) -> None:
    lab.run(script=NNP, process=default_spec()["process"] | {"noNewPrivileges": False})
    lab.wait_count("host1", 1)
    events = [
        json.loads(line) for line in lab.on("host1", "pymigrate", "--json", "move", "web", "host2").stdout.splitlines()
    ]
    assert len([event for event in events if event["event"] == "warning" and "Landlock" in event["message"]]) == 1
    assert events[-1]["event"] == "report"
