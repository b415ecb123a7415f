"""What the hosts of a lab use: processor, memory, network; read from their cgroups and links."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.writer import Gap
from tests.support.hosts import Hosts


@dataclass(frozen=True)
class Groups:
    """The cgroups of a host, all its processes in them: one directory in every hierarchy."""

    directories: tuple[str, ...]

    def _file(self, *names: str) -> Path | None:
        found = (Path(directory, name) for name in names for directory in self.directories)
        return next((path for path in found if path.exists()), None)

    def cpu(self) -> float | None:
        """Return the processor seconds that all its processes have used, those that have exited too."""
        if path := self._file("cpuacct.usage"):
            return int(path.read_text()) / 1e9
        if path := self._file("cpu.stat"):
            return int(dict(line.split() for line in path.read_text().splitlines())["usage_usec"]) / 1e6
        return None

    def memory(self) -> int | None:
        """Return the bytes that it uses now, files in memory included."""
        path = self._file("memory.usage_in_bytes", "memory.current")
        return int(path.read_text()) if path else None

    def peak(self) -> "Peak":
        """Begin to watch its largest use."""
        return Peak(self._file("memory.max_usage_in_bytes", "memory.peak"))


class Peak:
    """The largest use of memory since this was made."""

    def __init__(self, path: Path | None) -> None:
        self._fd = None
        if path is not None:
            try:
                self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                os.write(self._fd, b"0")  # version 2 resets it for this descriptor alone
            except OSError:  # version 2 before Linux 6.12
                self.close()

    def bytes(self) -> int | None:
        return None if self._fd is None else int(os.pread(self._fd, 64, 0))

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@dataclass(frozen=True)
class Used:
    """By both hosts during one move. None where the machine does not count it.

    `cpu`: processor seconds at source and target, without the container's own; `memory`: bytes at source and target
    by which their largest use exceeded the use before; `wire`: bytes in both directions on the source's link.
    """

    cpu: tuple[float | None, float | None]
    memory: tuple[int | None, int | None]
    wire: int


def _wire(hosts: Hosts, host: str) -> int:
    return sum(map(int, hosts.sh(host, "cat /sys/class/net/eth0/statistics/[rt]x_bytes").split()))


class Meter:
    """Measures one move, from `with` on. The program must run at the source when this is made.

    The container's own use of the processor is taken off: its rate at the source before the move, for as long as it ran
    at each host.
    """

    _SAMPLE = 1.0  # seconds in which the program's use is measured

    def __init__(self, hosts: Hosts, source: str, groups: tuple[Groups, Groups]) -> None:
        self._hosts, self._source, self._groups = hosts, source, groups
        before, began = groups[0].cpu(), time.monotonic()
        time.sleep(self._SAMPLE)
        after = groups[0].cpu()
        passed = time.monotonic() - began
        self._own = 0.0 if before is None or after is None else (after - before) / passed

    def __enter__(self) -> "Meter":
        self._wire = _wire(self._hosts, self._source)
        self._memory = [group.memory() for group in self._groups]
        self._peaks = [group.peak() for group in self._groups]
        self._cpu = [group.cpu() for group in self._groups]
        self._began = time.time()
        return self

    def read(self, gap: Gap) -> Used:
        """Return what has been used; the program stood still in `gap`."""
        ran = (gap.start - self._began, time.time() - gap.end)
        cpu = [
            None if before is None or (now := group.cpu()) is None else max(0.0, now - before - self._own * seconds)
            for before, group, seconds in zip(self._cpu, self._groups, ran, strict=True)
        ]
        memory = [
            None if before is None or (most := peak.bytes()) is None else max(0, most - before)
            for before, peak in zip(self._memory, self._peaks, strict=True)
        ]
        return Used((cpu[0], cpu[1]), (memory[0], memory[1]), _wire(self._hosts, self._source) - self._wire)

    def __exit__(self, *_: object) -> None:
        for peak in self._peaks:
            peak.close()
