"""linux.seccomp: what is refused, and what the compiled program answers for every kind of call."""

import copy
import errno
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import NotSupported, SpecError
from runtime.seccomp import filter as seccomp_filter
from runtime.seccomp import libseccomp
from runtime.spec.fields import Fields
from runtime.spec.seccomp import Seccomp, features, parse
from tests.support import bpf
from tests.unit.runtime.spec.test_config import VALUES, places

ALLOW, LOG, NOTIFY, KILL_PROCESS, KILL_THREAD = 0x7FFF0000, 0x7FFC0000, 0x7FC00000, 0x80000000, 0
ERRNO, TRACE, TRAP = 0x50000, 0x7FF00000, 0x30000
EPERM, ENOSYS = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
ENGINE_PROFILE = Path("/usr/share/containers/seccomp.json")  # Debian: golang-github-containers-common

native_x86_64 = pytest.mark.skipif(
    libseccomp.native_architecture() != bpf.X86_64, reason="the numbers of system calls here are those of x86-64"
)


def checked(value: dict[str, Any]) -> Seccomp:
    seccomp = parse(Fields({"linux": {"seccomp": value}}, "config.json").object("linux").object("seccomp"))
    assert seccomp is not None
    return seccomp


def compiled(default: str, *rules: dict[str, Any], **more: Any) -> bytes:
    return seccomp_filter.compile(checked({"defaultAction": default, "syscalls": list(rules), **more}))


def rule(names: str, action: str, *args: tuple[Any, ...], **more: Any) -> dict[str, Any]:
    """`args` are (index, op, value) or (index, "MASKED_EQ", mask, value)."""
    fields = ("index", "op", "value", "valueTwo")
    comparisons = [dict(zip(fields, (i, "SCMP_CMP_" + op, *values), strict=False)) for i, op, *values in args]
    return {"names": names.split(), "action": "SCMP_ACT_" + action, "args": comparisons, **more}


FULL = {
    "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
    "flags": ["SECCOMP_FILTER_FLAG_LOG"], "listenerPath": "/run/agent.sock", "listenerMetadata": "words",
    "syscalls": [
        rule("read write", "ALLOW"), rule("mkdir", "NOTIFY"), rule("mount", "ERRNO", errnoRet=22),
        rule("clone", "ALLOW", (0, "MASKED_EQ", 0x7E020000, 0)),
    ],
}  # fmt: skip


def test_all_of_it_is_read() -> None:
    seccomp = checked(FULL)
    assert (seccomp.default_action, seccomp.default_errno_ret) == ("SCMP_ACT_ERRNO", 1)
    assert seccomp.architectures == ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86")
    assert (seccomp.listener_path, seccomp.listener_metadata) == ("/run/agent.sock", "words")
    assert [each.names for each in seccomp.rules] == [("read", "write"), ("mkdir",), ("mount",), ("clone",)]
    assert seccomp.rules[2].errno_ret == 22
    (comparison,) = seccomp.rules[3].args
    assert (comparison.index, comparison.value, comparison.value_two) == (0, 0x7E020000, 0)
    assert (seccomp.load_flags, seccomp.notifies) == (2, True)


def test_an_empty_object_is_no_filter() -> None:
    assert parse(Fields({}, "config.json", "linux.seccomp")) is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(None, 4), ([], 0), (["SECCOMP_FILTER_FLAG_TSYNC"], 0), (["SECCOMP_FILTER_FLAG_LOG"], 2)],
)
def test_flags_for_the_kernel(flags: list[str] | None, expected: int) -> None:
    assert checked({"defaultAction": "SCMP_ACT_ALLOW", "flags": flags}).load_flags == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"defaultAction": None}, "defaultAction: is missing"),
        ({"defaultAction": "ALLOW"}, "defaultAction: must be one of SCMP_ACT_ALLOW, "),
        ({"defaultAction": "SCMP_ACT_NOTIFY", "defaultErrnoRet": None}, "defaultAction: must not be SCMP_ACT_NOTIFY"),
        ({"defaultAction": "SCMP_ACT_KILL"}, "defaultErrnoRet: is only for SCMP_ACT_ERRNO and SCMP_ACT_TRACE, not"),
        ({"defaultErrnoRet": 4095}, "defaultErrnoRet: must be a number from 0 to 4094"),
        ({"architectures": ["SCMP_ARCH_X86", "x86_64"]}, "architectures[1]: must be one of"),
        ({"flags": ["SECCOMP_FILTER_FLAG_NEW_LISTENER"]}, "flags[0]: must be one of SECCOMP_FILTER_FLAG_TSYNC"),
        (
            {"flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"], "syscalls": []},
            "flags[0]: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV needs",
        ),
        ({"listenerPath": None, "listenerMetadata": None}, "listenerPath: is missing: SCMP_ACT_NOTIFY needs"),
        ({"listenerPath": None, "syscalls": []}, "listenerMetadata: must not be set without listenerPath"),
        ({"syscalls": {}}, "syscalls: must be an array"),
        ({"syscalls": [{"names": [], "action": "SCMP_ACT_LOG"}]}, "syscalls[0].names: must be a non-empty array"),
        ({"syscalls": [{"names": [""], "action": "SCMP_ACT_LOG"}]}, "syscalls[0].names: must be a non-empty array"),
        ({"syscalls": [{"names": ["read"]}]}, "syscalls[0].action: is missing"),
        ({"syscalls": [rule("read", "PANIC")]}, "syscalls[0].action: must be one of"),
        ({"syscalls": [rule("read write", "NOTIFY")]}, "syscalls[0].names[1]: write must not be SCMP_ACT_NOTIFY"),
        ({"syscalls": [rule("read", "ALLOW", errnoRet=1)]}, "syscalls[0].errnoRet: is only for"),
        ({"syscalls": [rule("read", "TRACE", errnoRet=65536)]}, "syscalls[0].errnoRet: must be a number from 0 to 65"),
        ({"syscalls": [rule("read", "ERRNO", errnoRet="EPERM")]}, "syscalls[0].errnoRet: must be an integer"),
        ({"syscalls": [rule("read", "LOG", (6, "EQ", 0))]}, "syscalls[0].args[0].index: must be a number from 0 to 5"),
        ({"syscalls": [rule("read", "LOG", (0, "EQ", 0), (1, "IS", 0))]}, "syscalls[0].args[1].op: must be one of"),
        ({"syscalls": [rule("read", "LOG", (0, "EQ", 2**64))]}, "syscalls[0].args[0].value: must be a number from"),
        ({"syscalls": [rule("read", "LOG", (0, "EQ", -1))]}, "syscalls[0].args[0].value: must be a number from"),
        ({"syscalls": [rule("read", "LOG", (0, "EQ"))]}, "syscalls[0].args[0].value: is missing"),
        ({"syscalls": [rule("read", "LOG", (0, "MASKED_EQ", 1, "x"))]}, "syscalls[0].args[0].valueTwo: must be an"),
    ],
)
def test_the_field_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        checked({**FULL, **change})
    assert str(caught.value).startswith(f"config.json: linux.seccomp.{words}")


@settings(max_examples=300, deadline=None)
@given(place=st.sampled_from(places(FULL)), value=VALUES)
def test_any_mutation_compiles_or_is_one_clear_error(place: tuple[Any, ...], value: Any) -> None:
    config = copy.deepcopy(FULL)
    target: Any = config
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    said = ""
    try:
        assert len(seccomp_filter.compile(checked(config))) % 8 == 0
    except SpecError as error:
        said = str(error)
    assert not said or (said.startswith("config.json: linux.seccomp.") and "\n" not in said)


@native_x86_64
@pytest.mark.parametrize(
    ("action", "more", "expected"),
    [
        ("KILL", {}, KILL_THREAD), ("KILL_THREAD", {}, KILL_THREAD), ("KILL_PROCESS", {}, KILL_PROCESS),
        ("TRAP", {}, TRAP), ("LOG", {}, LOG), ("ERRNO", {}, EPERM), ("ERRNO", {"errnoRet": 0}, ERRNO),
        ("ERRNO", {"errnoRet": 4094}, ERRNO | 4094), ("TRACE", {}, TRACE | 1), ("TRACE", {"errnoRet": 7}, TRACE | 7),
        ("NOTIFY", {}, NOTIFY),
    ],
)  # fmt: skip
def test_every_action(action: str, more: dict[str, int], expected: int) -> None:
    program = compiled("SCMP_ACT_ALLOW", rule("mkdir", action, **more), listenerPath="/run/agent")
    assert bpf.run(program, 83) == expected
    assert bpf.run(program, 84) == ALLOW


@native_x86_64
@pytest.mark.parametrize(
    ("comparison", "hits", "misses"),
    [
        ((1, "EQ", 2**40), [2**40], [0, 2**40 + 1]),
        ((1, "NE", 2**40), [0, 1], [2**40]),
        ((1, "LT", 2**40), [2**40 - 1, 0], [2**40, 2**63]),
        ((1, "LE", 2**40), [2**40, 0], [2**40 + 1]),
        ((1, "GT", 2**40), [2**40 + 1, 2**64 - 1], [2**40, 1]),
        ((1, "GE", 2**40), [2**40, 2**63], [2**40 - 1]),
        ((1, "MASKED_EQ", 0xFF00, 0x1200), [0x1200, 0x991234], [0x1300, 0]),
    ],
)  # fmt: skip
def test_every_operator(comparison: tuple[Any, ...], hits: list[int], misses: list[int]) -> None:
    program = compiled("SCMP_ACT_ALLOW", rule("mkdir", "ERRNO", comparison))
    assert [bpf.run(program, 83, 7, value) for value in hits] == [EPERM] * len(hits)
    assert [bpf.run(program, 83, 7, value) for value in misses] == [ALLOW] * len(misses)


@native_x86_64
def test_different_arguments_must_all_hold() -> None:
    program = compiled("SCMP_ACT_ALLOW", rule("mkdir", "ERRNO", (0, "EQ", 1), (1, "EQ", 2)))
    assert [bpf.run(program, 83, *args) for args in ((1, 2), (1, 3), (2, 2))] == [EPERM, ALLOW, ALLOW]


@native_x86_64
def test_of_two_comparisons_of_one_argument_any_is_enough() -> None:
    """And then the others of that rule stand alone too; all as runc does it."""
    program = compiled("SCMP_ACT_ALLOW", rule("mkdir", "ERRNO", (0, "EQ", 1), (0, "EQ", 5), (1, "EQ", 2)))
    assert [bpf.run(program, 83, *args) for args in ((1, 0), (5, 0), (0, 2), (2, 0))] == [EPERM, EPERM, EPERM, ALLOW]


@native_x86_64
def test_unknown_names_and_redundant_rules_are_left_out() -> None:
    known = compiled("SCMP_ACT_ERRNO", rule("mkdir", "ALLOW"))
    more = (rule("no_such_call", "ALLOW"), rule("rmdir", "ERRNO"), rule("rmdir", "ERRNO", errnoRet=1))
    program = compiled("SCMP_ACT_ERRNO", rule("mkdir", "ALLOW"), *more)
    assert program == known.replace(struct.pack("=HBBI", 0x25, 0, 2, 83), struct.pack("=HBBI", 0x25, 0, 2, 84))


def test_contradicting_entries_are_named() -> None:
    entries = (rule("clone", "LOG", (0, "EQ", 5)), rule("clone", "ERRNO", (0, "EQ", 5)))
    with pytest.raises(SpecError, match=r"linux.seccomp.syscalls\[1\]: clone: conflicts with an earlier entry"):
        compiled("SCMP_ACT_ALLOW", *entries)


@native_x86_64
def test_architectures() -> None:
    alone = compiled("SCMP_ACT_ALLOW", rule("mkdir", "ERRNO"))
    assert bpf.run(alone, 83) == EPERM
    assert bpf.run(alone, 39, arch=bpf.X86) == KILL_THREAD
    assert bpf.run(alone, 84 | bpf.X32_BIT) == KILL_THREAD
    program = compiled("SCMP_ACT_ALLOW", rule("mkdir", "ERRNO"), architectures=["SCMP_ARCH_X86", "SCMP_ARCH_X32"])
    assert bpf.run(program, 83) == EPERM
    assert [bpf.run(program, number, arch=bpf.X86) for number in (39, 83)] == [EPERM, ALLOW]
    assert [bpf.run(program, number | bpf.X32_BIT) for number in (83, 84)] == [EPERM, ALLOW]


@native_x86_64
def test_a_call_of_another_architecture_only() -> None:
    program = compiled("SCMP_ACT_ALLOW", rule("fcntl64", "ERRNO"), architectures=["SCMP_ARCH_X86"])
    assert bpf.run(program, 221, arch=bpf.X86) == EPERM
    assert bpf.run(program, 221) == ALLOW


@pytest.mark.parametrize("name", [name for name in features()["archs"] if not name.startswith("SCMP_ARCH_MIPS")])
def test_every_architecture_is_compiled_or_refused_by_name(name: str) -> None:
    try:
        assert compiled("SCMP_ACT_ERRNO", rule("mkdirat", "ALLOW"), architectures=[name])
    except NotSupported as error:
        assert str(error).startswith("config.json: linux.seccomp.architectures[0]: ")  # noqa: PT017
        assert name in str(error) and name not in ("SCMP_ARCH_AARCH64", "SCMP_ARCH_X86_64", "SCMP_ARCH_ARM")  # noqa: PT017, PT018


@native_x86_64
@pytest.mark.parametrize("default", ["ERRNO", "KILL", "KILL_PROCESS", "TRAP"])
def test_newer_system_calls_are_enosys(default: str) -> None:
    archs = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_AARCH64"]
    rules = (rule("read statx", "ALLOW"), rule("renameat2", "LOG"))
    program = compiled("SCMP_ACT_" + default, *rules, architectures=archs)
    denied = bpf.run(program, 331)
    assert denied != ENOSYS
    assert [bpf.run(program, number) for number in (0, 316, 332)] == [ALLOW, LOG, ALLOW]
    assert [bpf.run(program, number) for number in (333, 439, 2**30 - 1)] == [ENOSYS] * 3
    x86 = [bpf.run(program, number, arch=bpf.X86) for number in (3, 382, 383, 384)]
    assert x86 == [ALLOW, denied, ALLOW, ENOSYS]
    assert [bpf.run(program, number | bpf.X32_BIT) for number in (0, 331, 332, 333)] == [ALLOW, denied, ALLOW, ENOSYS]
    arm = [bpf.run(program, number, arch=bpf.AARCH64) for number in (63, 290, 291, 292)]
    assert arm == [ALLOW, denied, ALLOW, ENOSYS]
    assert bpf.run(program, 400, arch=bpf.RISCV64) == KILL_THREAD


@native_x86_64
def test_an_x32_number_is_no_newer_x86_64_one() -> None:
    program = compiled("SCMP_ACT_ERRNO", rule("statx", "ALLOW"))
    assert [bpf.run(program, 333), bpf.run(program, 333 | bpf.X32_BIT)] == [ENOSYS, KILL_THREAD]


@native_x86_64
@pytest.mark.parametrize("default", ["ALLOW", "LOG", "TRACE"])
def test_a_default_that_lets_pass_gets_no_enosys(default: str) -> None:
    program = compiled("SCMP_ACT_" + default, rule("mkdir", "ERRNO"))
    assert bpf.run(program, 439) == {"ALLOW": ALLOW, "LOG": LOG, "TRACE": TRACE | 1}[default]


@native_x86_64
def test_the_tree_answers_as_the_list_does(monkeypatch: pytest.MonkeyPatch) -> None:
    names = "read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction ioctl pread64 "
    names += "readv writev access pipe select mremap msync mincore madvise shmget dup dup2 pause getitimer alarm getpid"
    rules = (rule(names, "ALLOW"), rule("mkdir", "LOG", (0, "GT", 5)), rule("statx", "ERRNO", errnoRet=9))
    tree = compiled("SCMP_ACT_KILL", *rules)
    monkeypatch.setattr(seccomp_filter, "_TREE_FROM", 1000)
    chain = compiled("SCMP_ACT_KILL", *rules)
    assert tree != chain
    for number in range(480):
        assert bpf.run(tree, number, 6) == bpf.run(chain, number, 6), number


def test_too_long_for_the_kernel() -> None:
    entries = [rule("mkdirat", "ERRNO", (0, "EQ", value << 32 | value)) for value in range(2000)]
    with pytest.raises(
        SpecError, match=r"linux.seccomp.syscalls: compiles to \d+ instructions, the kernel allows 4096"
    ):
        compiled("SCMP_ACT_ALLOW", *entries)


def test_what_the_library_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libseccomp, "api_level", lambda: 2)
    with pytest.raises(
        NotSupported, match=r"linux.seccomp.defaultAction: SCMP_ACT_LOG is not supported by libseccomp 2\."
    ):
        compiled("SCMP_ACT_LOG")
    with pytest.raises(NotSupported, match=r"linux.seccomp.syscalls\[1\].action: SCMP_ACT_NOTIFY is not supported by"):
        compiled("SCMP_ACT_ALLOW", rule("rmdir", "ERRNO"), rule("mkdir", "NOTIFY"), listenerPath="/a")


def test_features() -> None:
    found = features()
    assert found["enabled"] is True
    assert len(found["actions"]) == 9
    assert len(found["operators"]) == 7
    assert len(found["archs"]) == 23
    assert found["supportedFlags"] == found["knownFlags"]  # this kernel is newer than all of them
    assert "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" in found["knownFlags"]


@native_x86_64
@pytest.mark.skipif(not ENGINE_PROFILE.exists(), reason=f"no {ENGINE_PROFILE}")
def test_an_engines_default_profile() -> None:
    """Podman's, as it would write it for a container without capabilities, in runtime-spec's form."""
    profile = json.loads(ENGINE_PROFILE.read_text())
    kept = [
        {key: entry[key] for key in ("names", "action", "args", "errnoRet") if entry.get(key) is not None}
        for entry in profile["syscalls"]
        if not set(entry["includes"]) - {"arches"} and "CAP_SYS_ADMIN" not in entry["excludes"].get("caps", [])
    ]
    archs = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    default = profile["defaultAction"]
    for value, expected in ((profile["defaultErrnoRet"], ENOSYS), (1, ENOSYS)):
        program = compiled(default, *kept, defaultErrnoRet=value, architectures=archs)
        assert [bpf.run(program, number) for number in (0, 59, 231)] == [ALLOW] * 3  # read, execve, exit_group
        assert bpf.run(program, 323) == EPERM  # userfaultfd: named, refused
        assert bpf.run(program, 900) == expected
        assert bpf.run(program, 3, arch=bpf.X86) == ALLOW
