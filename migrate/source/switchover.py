"""The source's half of the switch-over: freeze, stream pages and images, and let go of the container or not.

CRIU's dump is held at `post-dump`: the tree is frozen and its network locked, all images are written. From there
`roll_back` thaws it as if nothing had happened, and `kill_source` ends it for good. A lost coordinator rolls back by
itself: CRIU thaws the tree when its socket closes.

Nothing is written to the source's disk: pages go through a socketpair straight into the connection; the other images
and CRIU's log land in a tmpfs that is mounted nowhere and vanishes with its descriptor.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from typing import Self

from criu_rpc.client import Criu
from criu_rpc.errors import CriuError, Error, SwrkDied
from migrate.errors import DeadlineExceeded
from migrate.preflight import watches
from migrate.source import tar_images
from migrate.wire import frames, protocol
from migrate.wire.pages import PageRelay
from migrate.wire.peer import Peer
from runtime.checkpoint import options as criu_options
from runtime.checkpoint.dump import Dump
from runtime.freeze import network_lock
from runtime.freeze.guard import Guard
from runtime.linux import syscalls
from runtime.network import veth
from runtime.spec.config import Spec
from runtime.state.record import State


class Switchover:
    """One container leaving. A context manager: leaving it without `kill_source` rolls back."""

    def __init__(
        self,
        state: State,
        spec: Spec,
        peer: Peer,
        on_bytes: Callable[[int], None],
        *,
        tcp_close: bool = False,
        carried: tuple[str, ...] = (),
    ) -> None:
        """What lies in the mounts at `carried` is not in the images."""
        self._state, self.spec, self._peer = state, spec, peer
        self._relay = PageRelay(Criu().version(), peer.send_pages, on_bytes)
        self._images = syscalls.detached_tmpfs(mode=0o700)  # and CRIU's log
        self._tcp_close, self._carried = tcp_close, carried
        self._watched = watches.names(state.pid)
        self.gate = contextlib.ExitStack()  # left when it is thawed, or at the end: that takes 15 ms
        self._guard: Guard | None = Guard(state)
        self._dump: Dump | None = None
        self.frozen_at = 0.0
        self.damage = ""  # what a roll back could not mend, in words

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.roll_back()
        if self._guard is not None:
            self._guard.close()
        self._relay.close()
        os.close(self._images)

    def freeze(
        self, timeout: float, on_frozen: Callable[[], None] = lambda: None, *, skip_in_flight: bool = False
    ) -> protocol.PagesEnd:
        """Dump up to `post-dump`; pages stream meanwhile. Afterwards the tree is frozen and `images()` complete.

        `timeout`, in seconds, is for all of that. `on_frozen` is called once no process of the container runs any more,
        while the dump goes on. With `skip_in_flight`, connections that have not been accepted yet are left out: they
        are lost.
        """
        options = criu_options.dump_options(
            self._state,
            self.spec,
            self._carried,
            images_dir_fd=self._images,
            work_dir_fd=self._images,
            page_server_fd=self._relay.criu_end.fileno(),
            tcp_skip_in_flight=skip_in_flight,
            irmap_scan_paths=self._watched,
        )
        self._relay.start()
        guard, self._guard = self._guard, None
        environment = tar_images.environment()
        self._dump = Dump(self._state, self.spec, options, timeout=timeout, guard=guard, env=environment)
        self._relay.criu_end.close()
        try:
            self._dump.run_until("pre-dump")
            self.frozen_at = time.monotonic()
            reached = self._dump.run_until("query-ext-files", "post-dump")  # whichever comes first
            on_frozen()
            if reached != "post-dump":
                self._dump.run_until("post-dump")
            self._dump.complete(self._images, keep=not self._tcp_close)
        except SwrkDied:
            raise
        except (CriuError, DeadlineExceeded) as error:
            raise self._relay.failure or error from None
        return self._relay.finish(max(0.0, self.frozen_at + timeout - time.monotonic()))

    def send_images(self, deadline: float) -> int:
        """Send every image but the pages, until `deadline` (time.monotonic()); returns how many."""
        names = sorted(name for name in os.listdir(self._images) if name.endswith(".img"))
        for name in names:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._images)
            with open(fd, "rb") as file:
                seen, size = hashlib.sha256(), 0
                for data in tar_images.contents(name, file):
                    seen.update(data)
                    size += len(data)
                self._peer.post(protocol.Image(name, size, seen.hexdigest()))
                for data in tar_images.contents(name, file):
                    for start in range(0, len(data), frames.CHUNK):
                        if time.monotonic() > deadline:
                            raise DeadlineExceeded("the images could not be sent in time")
                        self._peer.send_data(data[start : start + frames.CHUNK])
        return len(names)

    def require_frozen(self) -> None:
        """Raise CriuError when CRIU was killed while it held the tree: it may have run on."""
        assert self._dump is not None
        self._dump.require_frozen()

    def kill_source(self, on_killed: Callable[[], None]) -> None:
        """End the frozen tree: when this returns, no process of the container exists here any more.

        `on_killed` is called as soon as its end is certain. Its link is down before that, so that nothing tells the
        container's peers.
        """
        assert self._dump is not None
        if self._state.has_bridge:
            with contextlib.suppress(OSError, Error):  # it has to end all the same
                veth.take_down(self._state)
        self._dump.kill(self._peer.name, on_killed)
        network_lock.ended(self.spec, self._state.id)

    def roll_back(self) -> None:
        """Thaw the tree: it goes on as before. Harmless when there is nothing to thaw."""
        if self._dump is not None:
            try:
                self._dump.roll_back()
            except Error as error:
                self.damage = str(error)
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
