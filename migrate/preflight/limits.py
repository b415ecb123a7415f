"""What a target's root lacks that a restore needs: higher hard limits, lower OOM scores, capabilities.

CRIU sets the limits of what it restores in each process itself, and ignores what fails (criu/pie/restorer.c,
restore_rlims; criu/cr-restore.c, prepare_oom_score_adj): without CAP_SYS_RESOURCE in the host's own user namespace a
process has the agent's limits then, the soft ones included. Processes of other users need nothing more: a container
with one was restored here without the capability. Only a dump does, for the limits of a process of another user.

A capability that root there lacks is worse: capset(2) fails in the very last step of a restore (restorer.c,
restore_creds), when the source has given the container up.
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
    """What a process of this host that is started from this one can have at most, as "name=value"; -1 is no limit."""
    return tuple(f"{name}={value}" for name, value in [*_hard("self"), (_OOM, _lowest_oom_score())])


def _lowest_oom_score() -> int:
    """The lowest that this process may set for itself: the kernel shows it nowhere (proc_pid_oom_score_adj(5))."""
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
    """The limits of a container's processes that the target cannot give back; `there` is what `own` says there."""
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
            who = f"process {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})"
        except OSError:
            continue  # it has ended
        for name, value in limits:
            most = known.get(name, -1)
            if name in _OF_MEMORY and value == defaults[name]:
                continue
            if most != -1 and not -1 < value <= most:
                text = f"has a hard limit of {_words(value)} ({name}), and root of {target} can give {_words(most)}"
                found.setdefault(name, Blocker("limit", who, text))
        if score < known.get(_OOM, -1000):
            text = f"has the {_OOM} {score}, and root of {target} can give {known[_OOM]} at least"
            found.setdefault(_OOM, Blocker("limit", who, text))
    return list(found.values())


def lacking(init_pid: int, target: str, there: Iterable[str]) -> list[Blocker]:
    """The first thread of a container with capabilities that root of the target lacks; `there` names those it has."""
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
                continue  # it has ended
            if beyond := capabilities.names((int(fields["CapPrm"], 16) | int(fields["CapInh"], 16)) & ~held):
                who = f"process {pid} ({fields['Name'].strip()})"
                problem = f"has {', '.join(beyond)}, which root of {target} lacks: CRIU could not restore it"
                remedy = f"give root of {target} the capability, or take it out of process.capabilities"
                return [Blocker("capabilities", who, problem, remedy)]
    return []


def _words(value: int) -> str:
    return "no limit" if value == -1 else str(value)


def other_users(init_pid: int) -> str:
    """A process of the container that runs as another user than root of its own user namespace's, "" if none does."""
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
