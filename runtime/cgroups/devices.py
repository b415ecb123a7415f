"""Device rules on cgroup version 2: a BPF program that the kernel runs at every open and mknod.

Sources: bpf(2), kernel Documentation/bpf/standardization/instruction-set.rst, include/uapi/linux/bpf.h. The rules
have the meaning of version 1: they are applied in order, a later rule wins, a rule for all devices replaces those
before it.
"""

from __future__ import annotations

import errno
import os
import struct
import sys

from runtime.errors import StartFailed
from runtime.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.spec.resources import DeviceRule

_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _PROG_GET_FD_BY_ID, _GET_INFO, _PROG_QUERY = 5, 8, 9, 13, 15, 16
_TYPE_CGROUP_DEVICE = 15
_ATTACH_CGROUP_DEVICE = 6
_ALLOW_MULTI = 2
_NAME = b"pymigrate"
_LICENSE = b"Apache-2.0\0"
_LOG_SIZE = 1 << 16
_MAX_ATTACHED = 64  # the kernel's own limit of programs at one cgroup

# BPF_LDX|MEM|W, BPF_ALU64: MOV|K, MOV|X, AND|K, RSH|K; BPF_JMP: JA, JNE|K, JSET|K, EXIT
_LOAD, _SET, _COPY, _AND, _SHIFT, _JUMP, _UNLESS, _IF_ANY, _EXIT = 0x61, 0xB7, 0xBF, 0x57, 0x77, 0x05, 0x55, 0x45, 0x95
_RESULT, _CONTEXT, _KIND, _ACCESS, _MAJOR, _MINOR = range(6)  # registers
_KINDS = {"b": 1, "c": 2}
_ACCESSES = {"m": 1, "r": 2, "w": 4}

Instruction = tuple[int, int, int, int, int]  # code, destination, source, offset, immediate


def program(rules: Sequence[DeviceRule]) -> bytes:
    """Return the instructions that apply the rules; a device without a rule is allowed.

    One request may ask for several kinds of access at once. The last rule is looked at first: a denial of any of
    them refuses it, a permission takes its kinds off those that are still asked for.
    """
    start = max((index for index, rule in enumerate(rules) if rule.type == "a"), default=-1)
    code: list[Instruction] = [
        (_LOAD, _KIND, _CONTEXT, 0, 0),  # access << 16 | kind of device
        (_COPY, _ACCESS, _KIND, 0, 0),
        (_AND, _KIND, 0, 0, 0xFFFF),
        (_SHIFT, _ACCESS, 0, 0, 16),
        (_LOAD, _MAJOR, _CONTEXT, 4, 0),
        (_LOAD, _MINOR, _CONTEXT, 8, 0),
    ]
    for rule in reversed(rules[start + 1 :]):
        code += _rule(rule)
    code += _answer(start < 0 or rules[start].allow)
    # Destination and source share a byte, in the opposite order on a big-endian machine.
    little = sys.byteorder == "little"
    return b"".join(
        struct.pack("=BBhi", op, to | of << 4 if little else to << 4 | of, offset, value)
        for op, to, of, offset, value in code
    )


def _answer(allow: bool) -> list[Instruction]:
    return [(_SET, _RESULT, 0, 0, int(allow)), (_EXIT, 0, 0, 0, 0)]


def _rule(rule: DeviceRule) -> list[Instruction]:
    access = sum({_ACCESSES[letter] for letter in rule.access})
    if rule.allow:
        decision = [(_AND, _ACCESS, 0, 0, 7 & ~access), (_UNLESS, _ACCESS, 0, 2, 0), *_answer(True)]
    else:
        decision = [(_IF_ANY, _ACCESS, 0, 1, access), (_JUMP, 0, 0, 2, 0), *_answer(False)]
    tests = [(_KIND, _KINDS[rule.type]), (_MAJOR, rule.major), (_MINOR, rule.minor)]
    wanted = [(register, number) for register, number in tests if number is not None]
    if any(number >= 1 << 31 for _, number in wanted):
        return []  # no device can have this number
    size = len(wanted) + len(decision)
    return [
        (_UNLESS, register, 0, size - place - 1, number) for place, (register, number) in enumerate(wanted)
    ] + decision


def apply(directory: str, rules: Sequence[DeviceRule]) -> None:
    """Replace the device rules of a version 2 cgroup. Raises StartFailed."""
    cgroup = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        old = _attached(cgroup)
        try:
            if not all(rule.allow for rule in rules):
                # All programs of a cgroup must allow an access, so what both old and new rules allow stays allowed.
                new = _load(program(rules))
                try:
                    syscalls.bpf(_PROG_ATTACH, "IIII", cgroup, new, _ATTACH_CGROUP_DEVICE, _ALLOW_MULTI)
                finally:
                    os.close(new)
            for fd in old:
                syscalls.bpf(_PROG_DETACH, "IIII", cgroup, fd, _ATTACH_CGROUP_DEVICE, 0)
        finally:
            for fd in old:
                os.close(fd)
    except OSError as error:
        raise StartFailed(
            f"linux.resources.devices: the kernel rejects the BPF program of the rules: {error.strerror}",
            remedy="cgroup version 2 needs CAP_BPF or CAP_SYS_ADMIN, and CONFIG_CGROUP_BPF, for device rules",
        ) from None
    finally:
        os.close(cgroup)


def _load(code: bytes) -> int:
    """Load the program and return its descriptor. Raises OSError, or StartFailed with the verifier's words."""

    def load(level: int, log: bytearray) -> int:
        fd, _ = syscalls.bpf(
            _PROG_LOAD, "IIQQIIQIIQQ", _TYPE_CGROUP_DEVICE, len(code) // 8, code, _LICENSE,
            level, len(log) if level else 0, log if level else 0, 0, 0, *_name_words(),
        )  # fmt: skip
        return fd

    log = bytearray(_LOG_SIZE)
    try:
        return load(0, log)
    except OSError as first:
        if first.errno in (errno.EPERM, errno.ENOSYS):
            raise
        try:
            return load(1, log)
        except OSError as error:
            said = " / ".join(log.partition(b"\0")[0].decode(errors="replace").splitlines())
            if not said:
                raise
            raise StartFailed(
                f"linux.resources.devices: {error.strerror}; the kernel's verifier says: {said}"
            ) from None


def _name_words() -> tuple[int, int]:
    """Return the program's name as two words. Our programs are found by it."""
    name = _NAME.ljust(16, b"\0")
    return int.from_bytes(name[:8], sys.byteorder), int.from_bytes(name[8:], sys.byteorder)


def _attached(cgroup: int) -> list[int]:
    """Return descriptors of our programs that a cgroup has; none on a kernel that cannot list them."""
    ids = bytearray(4 * _MAX_ATTACHED)
    try:
        _, attributes = syscalls.bpf(
            _PROG_QUERY, "IIIIQIIQ", cgroup, _ATTACH_CGROUP_DEVICE, 0, 0, ids, _MAX_ATTACHED, 0, 0
        )  # fmt: skip
    except OSError:
        return []
    (count,) = struct.unpack_from("=I", attributes, 24)
    found = []
    for number in struct.unpack_from(f"={count}I", ids):
        fd, _ = syscalls.bpf(_PROG_GET_FD_BY_ID, "III", number, 0, 0)
        info = bytearray(256)
        syscalls.bpf(_GET_INFO, "IIQ", fd, len(info), info)
        if info[64:80].partition(b"\0")[0] == _NAME:
            found.append(fd)
        else:
            os.close(fd)
    return found
