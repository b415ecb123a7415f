"""Parse linux.seccomp of config.json; seccomp/filter.py compiles it, seccomp/load.py loads the program.

Sources: seccomp(2), seccomp_rule_add(3), runtime-spec 1.2 config-linux.md "Seccomp". Where the specification is silent,
the code does what runc does, because the profiles of container engines rely on it; each such place says so.
"""

from __future__ import annotations

import errno

from runtime.light.records import Record
from runtime.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from runtime.spec.fields import Fields

# linux/seccomp.h, SECCOMP_RET_*: the low 16 bits are for the errno, or the tracer's message.
ACTIONS = {
    "SCMP_ACT_ALLOW": 0x7FFF0000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_NOTIFY": 0x7FC00000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_TRAP": 0x00030000,
}
# The largest errnoRet: libseccomp takes what is below MAX_ERRNO (4095), and a tracer's message is 16 bits wide.
ERRNO_MAX = {"SCMP_ACT_ERRNO": 4094, "SCMP_ACT_TRACE": 0xFFFF}
# enum scmp_compare
OPERATORS = {
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_MASKED_EQ": 7,
    "SCMP_CMP_NE": 1,
}
_ARCHITECTURE_NAMES = (
    "AARCH64 ARM LOONGARCH64 M68K MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32 PARISC PARISC64 PPC PPC64 PPC64LE "
    "RISCV64 S390 S390X SH SHEB X32 X86 X86_64"
)
_ARCHITECTURES = tuple("SCMP_ARCH_" + name for name in _ARCHITECTURE_NAMES.split())
_TSYNC = "SECCOMP_FILTER_FLAG_TSYNC"
_SPEC_ALLOW = "SECCOMP_FILTER_FLAG_SPEC_ALLOW"
_WAIT_KILLABLE = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"
_FLAGS = {_TSYNC: 1 << 0, "SECCOMP_FILTER_FLAG_LOG": 1 << 1, _SPEC_ALLOW: 1 << 2, _WAIT_KILLABLE: 1 << 5}


class Comparison(Record):
    """One entry of `args`: argument `index` (0 to 5) compared with `value`.

    With SCMP_CMP_MASKED_EQ `value` is the mask and `value_two` the expected bits; else `value_two` is ignored.
    """

    index: int
    op: str
    value: int
    value_two: int


class Rule(Record):
    """One entry of `syscalls`; `errno_ret` is None if it is not given."""

    names: tuple[str, ...]
    action: str
    errno_ret: int | None
    args: tuple[Comparison, ...]


class Seccomp(Record):
    """linux.seccomp with the names of config.json; `rules` has its `syscalls` in their order."""

    default_action: str
    default_errno_ret: int | None
    architectures: tuple[str, ...]
    flags: tuple[str, ...]
    rules: tuple[Rule, ...]
    listener_path: str | None
    listener_metadata: str | None

    @property
    def notifies(self) -> bool:
        """Whether an agent must get a listener."""
        return any(rule.action == "SCMP_ACT_NOTIFY" for rule in self.rules)

    @property
    def load_flags(self) -> int:
        """The flags for `load`, without TSYNC: the kernel rejects it with a listener, and init has one thread."""
        return sum(_FLAGS[name] for name in set(self.flags) - {_TSYNC})


def parse(value: Fields) -> Seccomp | None:
    """Validate a linux.seccomp object; return None for an empty one. Raises SpecError naming the field."""
    if not value.value:
        return None
    default = _choice(value, "defaultAction", ACTIONS)
    if default == "SCMP_ACT_NOTIFY":
        value.refuse("defaultAction", "must not be SCMP_ACT_NOTIFY: init would wait for an agent without a listener")
    seccomp = Seccomp(
        default_action=default,
        default_errno_ret=_errno_ret(value, "defaultErrnoRet", default),
        architectures=_choices(value, "architectures", _ARCHITECTURES),
        flags=_flags(value),
        rules=tuple(map(_rule, value.objects("syscalls"))),
        listener_path=value.take("listenerPath", str, "") or None,
        listener_metadata=value.take("listenerMetadata", str, "") or None,
    )
    if seccomp.listener_metadata and not seccomp.listener_path:
        value.refuse("listenerMetadata", "must not be set without listenerPath")
    if seccomp.notifies and not seccomp.listener_path:
        value.refuse("listenerPath", "is missing: SCMP_ACT_NOTIFY needs an agent's socket")
    if _WAIT_KILLABLE in seccomp.flags and not seccomp.notifies:
        value.refuse(f"flags[{seccomp.flags.index(_WAIT_KILLABLE)}]", f"{_WAIT_KILLABLE} needs a SCMP_ACT_NOTIFY")
    return seccomp


def _choice(fields: Fields, name: str, allowed: Iterable[str]) -> str:
    value = fields.need(name, str)
    if value not in allowed:
        fields.refuse(name, f"must be one of {', '.join(allowed)}, not {value!r}")
    return value


def _choices(fields: Fields, name: str, allowed: Iterable[str]) -> tuple[str, ...]:
    values = fields.strings(name)
    for index, value in enumerate(values):
        if value not in allowed:
            fields.refuse(f"{name}[{index}]", f"must be one of {', '.join(allowed)}, not {value!r}")
    return values


def _errno_ret(fields: Fields, name: str, action: str) -> int | None:
    if fields.value.get(name) is not None and action not in ERRNO_MAX:
        fields.refuse(name, f"is only for {' and '.join(ERRNO_MAX)}, not for {action}")
    return fields.natural(name, largest=ERRNO_MAX.get(action, 0))


def _flags(fields: Fields) -> tuple[str, ...]:
    """Return the flags; without `flags` SPEC_ALLOW, as in runc, so that a filter does not slow the processor down."""
    return (_SPEC_ALLOW,) if fields.value.get("flags") is None else _choices(fields, "flags", _FLAGS)


def _rule(fields: Fields) -> Rule:
    names, action = fields.strings("names"), _choice(fields, "action", ACTIONS)
    if not all(names or ("",)):
        fields.refuse("names", "must be a non-empty array of names of system calls")
    if action == "SCMP_ACT_NOTIFY" and "write" in names:
        fields.refuse(
            f"names[{names.index('write')}]", "write must not be SCMP_ACT_NOTIFY: init needs it to pass on the listener"
        )
    errno_ret = _errno_ret(fields, "errnoRet", action)
    return Rule(names, action, errno_ret, tuple(map(_comparison, fields.objects("args"))))


def _comparison(fields: Fields) -> Comparison:
    return Comparison(
        index=_natural(fields, "index", 5),
        op=_choice(fields, "op", OPERATORS),
        value=_natural(fields, "value", 2**64 - 1),
        value_two=fields.natural("valueTwo", 0, largest=2**64 - 1) or 0,
    )


def _natural(fields: Fields, name: str, largest: int) -> int:
    fields.need(name, int)
    return fields.natural(name, largest=largest) or 0


def kernel_knows(flag: str) -> bool:
    """Return whether this kernel supports a flag of config.json."""
    # The kernel rejects WAIT_KILLABLE_RECV without NEW_LISTENER, and TSYNC with it.
    listener = 0 if flag == _TSYNC else syscalls.SECCOMP_FILTER_FLAG_NEW_LISTENER
    try:
        syscalls.seccomp_set_filter(None, _FLAGS[flag] | listener)
    except OSError as error:
        return error.errno == errno.EFAULT
    return False


def features() -> dict[str, Any]:
    """Return the linux.seccomp object of the `features` document (runtime-spec features-linux.md)."""
    return {
        "enabled": True,
        "actions": list(ACTIONS),
        "operators": list(OPERATORS),
        "archs": list(_ARCHITECTURES),
        "knownFlags": list(_FLAGS),
        "supportedFlags": [name for name in _FLAGS if kernel_knows(name)],
    }
