"""The source's half of the switch-over: freeze, stream pages and images, and let go of the container or not.

CRIU's dump is held at `post-dump`: the tree is frozen and its network locked, all images are written. From there
`roll_back` thaws it as if nothing had happened, and `give_up` ends it for good. A lost coordinator rolls back by
itself: CRIU thaws the tree when its socket closes.

Nothing is written to the source's disk: pages go through a socketpair straight into the connection; the other images
and CRIU's log land in a tmpfs that is mounted nowhere and vanishes with its descriptor.
"""

import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Callable
from typing import Self

from criu_rpc.client import Criu, DumpSession
from criu_rpc.errors import CriuError
from migrate import protocol
from migrate.errors import DeadlineExceeded, MigrateError
from migrate.pages import PageRelay
from migrate.peer import Peer
from runtime import checkpoint, held, netlock, processes, supplement, syscalls, veth
from runtime.cgroups import Cgroup
from runtime.errors import ContainerError
from runtime.spec import Spec
from runtime.state import State

DEATH_TIMEOUT = 30.0
GHOST_LIMIT = 512 << 20  # bytes of an open file without a name that go with the images


class Departure:
    """One container leaving. A context manager: leaving it without `give_up` rolls back."""

    def __init__(
        self, state: State, spec: Spec, peer: Peer, on_bytes: Callable[[int], None], *, tcp_close: bool = False
    ) -> None:
        self._state, self.spec, self._peer = state, spec, peer
        self._relay = PageRelay(Criu().version(), peer.send_pages, on_bytes)
        self._images = syscalls.detached_tmpfs(mode=0o700)  # and CRIU's log
        self._init = os.pidfd_open(state.pid)
        self._tcp_close = tcp_close
        self.gate = contextlib.ExitStack()  # left when it is thawed, or at the end: that takes 15 ms
        self._session: DumpSession | None = None
        self._hold: held.Hold | None = None
        self.frozen_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.roll_back()
        self._relay.close()
        os.close(self._images)
        os.close(self._init)

    def freeze(
        self, timeout: float, on_frozen: Callable[[], None] = lambda: None, *, skip_in_flight: bool = False
    ) -> protocol.PagesEnd:
        """Dump up to `post-dump`; pages stream meanwhile. Afterwards the tree is frozen and `images()` complete.

        `on_frozen` is called once no process of the container runs any more, while the dump goes on. With
        `skip_in_flight`, connections that have not been accepted yet are left out: they are lost.
        """
        if processes.start_time(self._state.pid) != self._state.pid_start_time:
            raise MigrateError(f"container {self._state.id}: its init is gone")
        options = checkpoint.dump_options(
            self._state,
            self.spec,
            images_dir_fd=self._images,
            work_dir_fd=self._images,
            page_server_fd=self._relay.criu_end.fileno(),
            tcp_skip_in_flight=skip_in_flight,
            ghost_limit=GHOST_LIMIT,
        )
        self._relay.start()
        self._session = Criu().dump(options, timeout=timeout)
        self._relay.criu_end.close()
        try:
            self._session.run_until("pre-dump")
            self.frozen_at = time.monotonic()
            reached = self._session.run_until("query-ext-files", "post-dump")  # whichever comes first
            on_frozen()
            if reached.script != "post-dump":
                self._session.run_until("post-dump")
            supplement.save(self._images, self._state, Cgroup.of(self._state))
            self._hold = held.complete(self._state, self._images)
            netlock.prepare(self._state, self.spec, self._images, keep=not self._tcp_close)
        except CriuError as error:
            raise self._relay.failure or error from None
        return self._relay.finish()

    def send_images(self) -> int:
        """Send every image but the pages; returns how many."""
        names = sorted(name for name in os.listdir(self._images) if name.endswith(".img"))
        for name in names:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._images)
            with open(fd, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                self._peer.post(protocol.Image(name, file.tell(), digest))
                file.seek(0)
                while data := file.read(protocol.CHUNK):
                    self._peer.send_data(data)
        return len(names)

    def give_up(self) -> None:
        """End the frozen tree: when this returns, no process of the container exists here any more.

        It is killed before CRIU is answered, so that it cannot run again even if CRIU or we die now. Its link is down
        before that, so that nothing tells the container's peers.
        """
        if self._hold is not None:
            self._hold.moved(self._peer.name)
        if self._state.has_bridge:
            with contextlib.suppress(OSError, ContainerError):  # it has to end all the same
                veth.take_down(self._state)
        signal.pidfd_send_signal(self._init, signal.SIGKILL)
        if self._session is not None:
            with contextlib.suppress(CriuError):
                self._session.finish()
            self._session = None
        if not processes.wait_exit(self._init, DEATH_TIMEOUT):
            raise DeadlineExceeded(f"container {self._state.id}: its processes do not end here")
        if self._hold is not None:
            self._hold.close()
            self._hold = None
        netlock.ended(self.spec, self._state.id)

    def roll_back(self) -> None:
        """Thaw the tree: it goes on as before. Harmless when there is nothing to thaw."""
        if self._hold is not None:
            self._hold.release()
            self._hold = None
        if self._session is not None:
            self._session.abort()
            self._session = None
        self.gate.close()

    def dropped_watches(self) -> int:
        """How many inotify and fanotify descriptors had events that nobody had read: CRIU does not carry those."""
        return self.log().count(b"events will be dropped")

    def log(self) -> bytes:
        """CRIU's log of the dump, b"" if there is none."""
        try:
            with open(os.open("dump.log", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._images), "rb") as file:
                return file.read()
        except OSError:
            return b""
