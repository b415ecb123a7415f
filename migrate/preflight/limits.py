"""Check what a restore needs and the target's root may lack: higher hard limits, lower OOM scores, capabilities.

CRIU sets limits in each restored process and ignores failures (criu/pie/restorer.c, restore_rlims;
criu/cr-restore.c, prepare_oom_score_adj): without CAP_SYS_RESOURCE in the host's own user namespace the process keeps
the agent's limits, the soft ones included. A restore of processes of other users does not need the capability (such a
container was restored here without it). A dump does, to read the limits of a process of another user.

A capability that the target's root lacks is worse: capset(2) fails in the very last step of a restore (restorer.c,
restore_creds), when the source has killed the container.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from migrate.errors import ProtocolError
from migrate.preflight.rules import Blocker
from runtime.linux import capabilities, processes

_LINE = re.compile(r"Max (\S+(?: \S+)*) {2,}(\S+) +(\S+)")
_OOM = "OOM score adjustment"
_OF_MEMORY = ("processes", "pending signals")  # the kernel's defaults for these grow with the host's memory


def own() -> tuple[str, ...]:
    """Return the highest hard limits that a child of this process can have, as "name=value"; -1 is unlimited."""
    return tuple(f"{name}={value}" for name, value in [*_hard("self"), (_OOM, _lowest_oom_score())])


def _lowest_oom_score() -> int:
    """Return the lowest score that this process may set, by trying: no file shows it (proc_pid_oom_score_adj(5))."""
    path = Path("/proc/self/oom_score_adj")
    before = path.read_text()
    try:
        path.write_text("-1000")
    except OSError:
        return int(before)
    path.write_text(before)
    return -1000


def _hard(pid: str) -> Iterator[tuple[str, int]]:
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]:
        if match := _LINE.match(line):
            yield match[1], -1 if match[3] == "unlimited" else int(match[3])


def blockers(init_pid: int, target: str, there: Iterable[str]) -> list[Blocker]:
    """Return a blocker for each limit that the target cannot restore; `there` is the target's `own()`."""
    try:
        known = {name: int(value) for name, _, value in (item.rpartition("=") for item in there)}
    except ValueError:
        raise ProtocolError(f"{target}: HostFacts: limits: a value is not a number") from None
    defaults = dict(_hard("self"))
    found: dict[str, Blocker] = {}
    for pid in processes.container_pids(init_pid):
        try:
            limits = list(_hard(str(pid)))
            score = int(Path(f"/proc/{pid}/oom_score_adj").read_text())
            subject = f"process {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})"
        except OSError:
            continue  # it has exited
        for name, value in limits:
            most = known.get(name, -1)
            if name in _OF_MEMORY and value == defaults[name]:
                continue
            if most != -1 and not -1 < value <= most:
                text = f"has a hard limit of {_words(value)} ({name}), and root of {target} can set only {_words(most)}"
                found.setdefault(name, Blocker("limit", subject, text))
        if score < known.get(_OOM, -1000):
            text = f"has the {_OOM} {score}, and root of {target} can set only {known[_OOM]} or more"
            found.setdefault(_OOM, Blocker("limit", subject, text))
    return list(found.values())


def lacking(init_pid: int, target: str, there: Iterable[str]) -> list[Blocker]:
    """Return a blocker for the first thread with capabilities that the target's root lacks; `there` names root's."""
    held = capabilities.mask(there)
    for pid in processes.container_pids(init_pid):
        try:
            threads = list(Path(f"/proc/{pid}/task").glob("*/status"))
        except OSError:
            continue  # it has ended
        for status in threads:
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            except OSError:
                continue  # it has exited
            if beyond := capabilities.names((int(fields["CapPrm"], 16) | int(fields["CapInh"], 16)) & ~held):
                subject = f"process {pid} ({fields['Name'].strip()})"
                problem = f"has {', '.join(beyond)}, which root of {target} lacks: CRIU could not restore it"
                remedy = f"give root of {target} the capability, or remove it from process.capabilities"
                return [Blocker("capabilities", subject, problem, remedy)]
    return []


def _words(value: int) -> str:
    return "unlimited" if value == -1 else str(value)


def other_users(init_pid: int) -> str:
    """Return a process of the container, in this user namespace, that does not run as root; "" if there is none."""
    for pid in processes.container_pids(init_pid):
        try:
            if os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user"):
                continue
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if set((fields["Uid"] + fields["Gid"]).split()) - {"0"}:
            return f"process {pid} ({fields['Name'].strip()})"
    return ""
