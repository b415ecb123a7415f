"""Suspect processes of using Landlock: CRIU does not carry a thread's domain, and the kernel does not show it.

Neither /proc nor ptrace(2) shows a domain (Linux 6.18): every check compares it with that of the process that asks, so
only code that runs in the thread could find out. This much is known from outside (landlock(7)):

- the kernel must have Landlock;
- a thread that enters a domain has no-new-privileges, or CAP_SYS_ADMIN.

Among those threads, these are suspected: threads whose program or libraries contain the system calls, and threads that
have no-new-privileges though config.json does not ask for it, and no seccomp filter that would explain it. In a
container with no-new-privileges in its config.json, the domain of an interpreted program is missed, and one that a
program had entered before it executed the present one.
"""

import platform
from collections.abc import Iterator
from pathlib import Path

from runtime.linux import processes, syscalls
from runtime.spec.config import Spec

_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_NEAR = 64 << 10  # bytes of code between the two calls
_LARGEST = 256 << 20  # bytes of code that are looked at
_CHUNK = 4 << 20


def suspects(init_pid: int, spec: Spec) -> list[str]:
    """Return the processes that may have confined themselves with Landlock, each as the subject of a sentence."""
    if not syscalls.landlock_version():
        return []
    asked = spec.process.no_new_privileges
    admin = "CAP_SYS_ADMIN" in (spec.process.capabilities or {}).get("bounding", ())
    code = _Code()
    found = []
    for pid in sorted(processes.container_pids(init_pid)):
        try:
            threads = [_status(path) for path in Path(f"/proc/{pid}/task").iterdir()]
            itself = not asked and any((privileges, seccomp) == ("1", "0") for privileges, seccomp in threads)
            able = admin or any(privileges == "1" for privileges, _ in threads)
            caller = code.caller(pid) if able else ""
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            continue  # it has exited
        if caller:
            found.append(f"process {pid} ({name}), as {caller} can")
        elif itself:
            found.append(f"process {pid} ({name}), which has set no-new-privileges itself")
    return found


def warning(container_id: str, found: list[str]) -> str:
    """Return the warning about `found`, "" if that is empty."""
    if not found:
        return ""
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"container {container_id}: Landlock is not carried, and cannot be seen from outside: "
        f"a process that has confined itself with it runs unconfined after the move. "
        f"This may concern {'; '.join(found[:3])}{more}"
    )


def _status(task: Path) -> tuple[str, str]:
    """Return the fields NoNewPrivs and Seccomp of a thread."""
    fields = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
    return fields.get("NoNewPrivs", "0"), fields.get("Seccomp", "0")


class _Code:
    """The executable memory of processes; each file is searched once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], bool] = {}
        self._left = _LARGEST

    def caller(self, pid: int) -> str:
        """Return the file of a process that makes Landlock's system calls, "" if none is found."""
        with open(f"/proc/{pid}/maps", errors="surrogateescape") as file:
            lines = [line.rstrip("\n").split(None, 5) for line in file]
        for fields in lines:
            place, access, offset, device, inode = fields[:5]
            path = fields[5] if len(fields) > 5 else "memory"
            if access[2] != "x" or path.startswith("[v"):
                continue
            key = (device, inode, offset) if inode != "0" else (str(pid), place)
            if key not in self._known:
                self._known[key] = self._calls(pid, *(int(part, 16) for part in place.split("-")))
            if self._known[key]:
                return path
        return ""

    def _calls(self, pid: int, start: int, end: int) -> bool:
        makes: dict[int, list[int]] = {_CREATE_RULESET: [], _RESTRICT_SELF: []}
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
            while start < end and self._left > 0:
                try:
                    file.seek(start)
                    data = file.read(min(_CHUNK, end - start))
                except OSError:
                    return False
                for number, places in makes.items():
                    places.extend(start + place for place in _loads(data, number))
                start += len(data) or _CHUNK
                self._left -= len(data)
        return any(abs(one - two) < _NEAR for one in makes[_CREATE_RULESET] for two in makes[_RESTRICT_SELF])


def _loads(code: bytes, number: int) -> Iterator[int]:
    """Yield the offsets where code loads a system call's number into its register, or into that of syscall(2)."""
    machine = platform.machine()
    if machine == "x86_64":  # mov $number, %eax or %edi, or %rax or %rdi
        for at in _places(code, number.to_bytes(4, "little")):
            if code[at - 1 : at] in (b"\xb8", b"\xbf") or code[at - 3 : at] in (b"\x48\xc7\xc0", b"\x48\xc7\xc7"):
                yield at
    elif machine == "aarch64":  # mov w8 or w0, or x8 or x0, #number
        for base in (0x52800000, 0xD2800000):
            for register in (0, 8):
                word = (base | number << 5 | register).to_bytes(4, "little")
                yield from (at for at in _places(code, word) if at % 4 == 0)


def _places(code: bytes, word: bytes) -> Iterator[int]:
    at = code.find(word)
    while at >= 0:
        yield at
        at = code.find(word, at + 1)
