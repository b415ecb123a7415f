"""Compile a validated linux.seccomp to the BPF program that init loads; in the parent, before anything is created.

libseccomp orders rules and comparisons. This module adds runc's answer to system calls newer than the profile.
"""

from __future__ import annotations

import errno
from struct import pack

from runtime.errors import NotSupported, SpecError
from runtime.seccomp import libseccomp
from runtime.spec.seccomp import ACTIONS, ERRNO_MAX, OPERATORS, kernel_knows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from runtime.spec.seccomp import Rule, Seccomp

# seccomp_api_get(3)
_API_LEVELS = {"SCMP_ACT_KILL_PROCESS": 3, "SCMP_ACT_LOG": 3, "SCMP_ACT_NOTIFY": 5}
_LONGEST_PROGRAM = 4096  # instructions, BPF_MAXINSNS
_TREE_FROM = 32  # rules; a shorter filter is as fast without a tree, and libseccomp 2.5 breaks on an empty tree

_AUDIT_ARCH_X86_64, _ARCH_X32 = 0xC000003E, 0x4000003E
_X32_BIT = 0x40000000
_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_GREATER_EQUAL, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x06


def compile(seccomp: Seccomp) -> bytes:
    """Return the BPF program, an array of struct sock_filter in this machine's byte order. Needs libseccomp.so.2.

    The native architecture is always included. A name that libseccomp does not know is left out, because the engines'
    profiles name newer system calls; so is a rule whose action is the default action. runc does both too. Raises
    NotSupported, SpecError.
    """
    _check_host(seccomp)
    native = libseccomp.native_architecture()
    tokens = list(dict.fromkeys([native, *map(_token, seccomp.architectures)]))
    default = _return_value(seccomp.default_action, seccomp.default_errno_ret)
    with libseccomp.Filter(default) as built:
        for index, name in enumerate(seccomp.architectures):
            try:
                built.add_architecture(_token(name))
            except OSError as error:
                why = "has a different byte order from this machine" if error.errno == errno.EDOM else error.strerror
                _refuse(f"architectures[{index}]", f"{name} {why}", NotSupported)
        count = 0
        for index, rule in enumerate(seccomp.rules):
            action = _return_value(rule.action, rule.errno_ret)
            if action != default:
                count += _add(built, index, rule, action, native)
        if count > _TREE_FROM:
            built.search_by_tree()
        program = _enosys_stub(seccomp, default, tokens) + built.export()
    if len(program) > 8 * _LONGEST_PROGRAM:
        text = f"compiles to {len(program) // 8} instructions, the kernel allows {_LONGEST_PROGRAM}"
        _refuse("syscalls", text, SpecError)
    return program


def _refuse(place: str, problem: str, error: type[SpecError]) -> NoReturn:
    raise error(f"config.json: linux.seccomp.{place}: {problem}")


def _token(name: str) -> int:
    return libseccomp.architecture(name.removeprefix("SCMP_ARCH_").lower())


def _check_host(seccomp: Seccomp) -> None:
    """Raise NotSupported for what this libseccomp or this kernel lacks."""
    level = libseccomp.api_level()
    actions = [("defaultAction", seccomp.default_action)]
    actions += [(f"syscalls[{index}].action", rule.action) for index, rule in enumerate(seccomp.rules)]
    for place, action in actions:
        if _API_LEVELS.get(action, 0) > level:
            text = f"{action} is not supported by libseccomp {libseccomp.version()} with this kernel"
            _refuse(place, text, NotSupported)
    for index, name in enumerate(seccomp.architectures):
        if not _token(name):
            _refuse(f"architectures[{index}]", f"libseccomp {libseccomp.version()} does not know {name}", NotSupported)
    for index, name in enumerate(seccomp.flags):
        if not kernel_knows(name):
            _refuse(f"flags[{index}]", f"this kernel does not know {name}", NotSupported)


def _return_value(action: str, errno_ret: int | None) -> int:
    """Return the filter's return value for an action; the specification's default errno is EPERM."""
    if action not in ERRNO_MAX:
        return ACTIONS[action]
    return ACTIONS[action] | (errno.EPERM if errno_ret is None else errno_ret)


def _add(built: libseccomp.Filter, index: int, rule: Rule, action: int, native: int) -> int:
    """Add a rule for each of the names; return the number of library calls."""
    comparisons = tuple((arg.index, OPERATORS[arg.op], arg.value, arg.value_two) for arg in rule.args)
    # libseccomp rejects two comparisons of one argument in a rule. Each comparison then becomes a separate rule, so
    # that any of them is enough, as in runc.
    indexes = [arg.index for arg in rule.args]
    groups = [comparisons] if len(set(indexes)) == len(indexes) else [(one,) for one in comparisons]
    count = 0
    for name in rule.names:
        number = libseccomp.syscall_number(native, name)
        if number is None:
            continue
        for group in groups:
            try:
                built.add_rule(action, number, group)
            except OSError as error:
                why = "conflicts with an earlier entry" if error.errno == errno.EEXIST else error.strerror
                _refuse(f"syscalls[{index}]", f"{name}: {why}", SpecError)
            count += 1
    return count


def _enosys_stub(seccomp: Seccomp, default: int, tokens: list[int]) -> bytes:
    """Return the instructions before the filter that answer ENOSYS to system calls newer than the profile, as in runc.

    The C library tries a new call and falls back at ENOSYS, but not at EPERM. A call is newer if its number is larger
    than all that the profile names, with any action. A default action that lets calls pass needs no stub. Each section
    ends where the next one, or the filter, begins.
    """
    enosys = ACTIONS["SCMP_ACT_ERRNO"] | errno.ENOSYS
    if default == enosys or seccomp.default_action in ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE"):
        return b""
    names = {name for rule in seccomp.rules for name in rule.names}
    stub = b""
    for token in tokens:
        last = max((libseccomp.syscall_number(token, name) or 0 for name in names), default=0)
        if last <= 0:
            continue
        # The kernel shows x32 as x86-64 with a bit of the number set. Such a number is not a newer x86-64 one.
        arch = _AUDIT_ARCH_X86_64 if token == _ARCH_X32 else token
        below = [(_JUMP_GREATER_EQUAL, 1, 0, _X32_BIT)] if token == _AUDIT_ARCH_X86_64 else []
        tail = [*below, (_RETURN, 0, 0, enosys)]
        section = [
            (_LOAD, 0, 0, 4),  # seccomp_data.arch
            (_JUMP_EQUAL, 0, len(tail) + 2, arch),
            (_LOAD, 0, 0, 0),  # seccomp_data.nr
            (_JUMP_GREATER, 0, len(tail), last),
        ]
        stub += b"".join(pack("=HBBI", *instruction) for instruction in section + tail)
    return stub
