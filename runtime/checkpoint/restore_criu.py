"""The CRIU of a restore: started where the restored init is to be a child, with everything that it has to inherit."""

from __future__ import annotations

import fcntl
import os
import socket

from criu_rpc.swrk import Swrk
from runtime.init import container as container_init
from runtime.init import program as container_program
from runtime.light.records import Record
from runtime.linux import processes, selfexec, syscalls
from runtime.linux.descriptors import Owned
from runtime.monitor import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from runtime.checkpoint.restore_network import RestoredNetwork
    from runtime.lifecycle.provision import Provision


class RestorePlan(Record):
    """What a restore has to know beside the spec.

    `stdio` are the init's standard streams as they were named at the dump ("pipe:[123]"); `rootfs` overrides the
    bundle's; `carried` are the fields of the old state that the new one gets, beside annotations: created,
    bundle_hints, resources; `move` is the migration that this belongs to, `source` the host that it comes from;
    `options` are further RestoreOptions. An `adoptable` container belongs to the caller if that is ready to adopt it
    (monitor/spawn.py); a `foreground` one is a child of this process, with its standard streams. `mounted` are mounts
    of this host that are bound into the container: mount point in the container -> path here.
    """

    id: str
    bundle: str
    images: str
    work: str
    stdio: tuple[str, ...]
    carried: dict[str, Any] = {}
    rootfs: str | None = None
    move: str | None = None
    source: str | None = None
    options: dict[str, Any] = {}
    adoptable: bool = False
    foreground: bool = False
    systemd: bool = False
    mounted: dict[str, str] = {}


class RestoringCriu:
    """A CRIU that waits for its request, and the monitor that keeps what it restores.

    `monitor` is None in the foreground. `inherit` pairs the names of files in the images with descriptors of the CRIU
    process, see RestoreOptions.
    """

    def __init__(self, made: Provision, plan: RestorePlan) -> None:
        self._made, self._plan = made, plan
        self._connection: Swrk | None = None
        self.monitor: spawn.Monitor | None = None
        self.inherit: tuple[tuple[str, int], ...] = ()

    def start(self, path: str, network: RestoredNetwork) -> None:
        """Start the binary at `path`. Must be called by a process without threads. Raises ContainerError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with Owned() as owner:
                owner.socket(theirs)
                self._start(path, network, theirs, owner)
        except BaseException:
            ours.close()
            raise
        self._connection = Swrk.adopt(ours)

    def _start(self, path: str, network: RestoredNetwork, theirs: socket.socket, owner: Owned) -> None:
        external = network.open_namespaces(owner)
        streams = [_duplicate(fd, owner) for fd in (0, 1, 2)]
        (out_r, out_w), (err_r, err_w) = owner.pipe(), owner.pipe()
        made = self._made
        argv = selfexec.command(
            "runtime.checkpoint.criu_launcher",
            made.state.rootfs,
            "cgroupns" if "cgroup" in made.spec.namespaces else "",
            f"_ses.{made.state.id}",
            *made.cgroup.directories(),
            *("--", path, "swrk", str(theirs.fileno())),
        )
        inherited = [theirs.fileno(), *streams, out_w, err_w, *(fd for _, fd in external)]
        if self._plan.foreground:
            syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
            if processes.fork() == 0:
                _become(argv, inherited)
            monitor_pid = 0
        else:
            self.monitor = spawn.spawn(
                made.state.directory, lambda _own: _become(argv, inherited), cgroup=made.cgroup, stdout=out_r,
                stderr=err_r, adoptable=self._plan.adoptable, fresh=True,
            )  # fmt: skip
            monitor_pid = self.monitor.pid
        ends = (-1, out_w, err_w) if monitor_pid else tuple(streams)
        made.add_monitor(monitor_pid, self._names(ends))
        made.store.save(made.state)
        self.inherit = (*external, *self._pipes(ends))

    def _pipes(self, ends: tuple[int, ...]) -> list[tuple[str, int]]:
        """Pair the pipes that were the container's standard streams with those that take their place."""
        found: dict[str, int] = {}
        for name, fd in zip(self._plan.stdio, ends, strict=False):
            if name.startswith("pipe:") and fd >= 0:
                found.setdefault(name, fd)
        return list(found.items())

    def _names(self, ends: tuple[int, ...]) -> tuple[str, str, str]:
        """Return the names that /proc will show of the init's standard streams."""
        names = [os.readlink(f"/proc/self/fd/{fd}") if fd >= 0 else "/dev/null" for fd in ends]
        if self._made.spec.process.terminal:
            names = [*self._plan.stdio, "", "", ""]
        return names[0], names[1], names[2]

    def take_connection(self) -> Swrk:
        """Return the connection, which the caller owns from here on."""
        assert self._connection is not None
        connection, self._connection = self._connection, None
        return connection

    def close(self) -> None:
        """Close the connection, if nobody has taken it: CRIU exits then."""
        if self._connection is not None:
            self.take_connection().close()


def _become(argv: list[str], inherited: list[int]) -> NoReturn:
    """In a forked process: become the program `argv`, with these descriptors (-1 for none) and /dev/null as 0 to 2."""
    container_program.reset_signals()
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    container_init.close_all_but(set(inherited), 0)
    for fd in inherited:
        if fd >= 0:
            os.set_inheritable(fd, True)
    selfexec.execute(argv)


def _duplicate(fd: int, owner: Owned) -> int:
    """Duplicate a descriptor above the standard ones; -1 if it is closed."""
    try:
        return owner.fd(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
    except OSError:
        return -1
