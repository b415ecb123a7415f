"""The source's half of the switch-over: freeze, send pages and images, then end the container here or thaw it.

CRIU's dump is held at `post-dump`: the tree is frozen, its network is locked, and all images are written. From there
`roll_back` thaws it as if nothing had happened, and `kill_source` ends it for good.

Nothing is written to the source's disk. Pages go through a socketpair straight into the connection. The other images
and CRIU's log are in a tmpfs that is mounted nowhere and vanishes with its descriptor.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from criu_rpc.client import Criu
from criu_rpc.errors import CriuError, Error, SwrkDied
from criu_rpc.options import page_server_config
from migrate import faults
from migrate.errors import DeadlineExceeded
from migrate.interrupts import uninterruptible
from migrate.memory.clean_pages import PARENT, CleanPages, make_parent
from migrate.memory.layout import Range
from migrate.model import Compression
from migrate.preflight import watches
from migrate.source import tar_images
from migrate.source.ending import end_source
from migrate.wire import frames, protocol
from migrate.wire.carrier import Carrier
from migrate.wire.pages import Objects, PageRelay
from migrate.wire.peer import Peer
from runtime.checkpoint import options as criu_options
from runtime.checkpoint.dump import Dump
from runtime.freeze import syn_gate
from runtime.freeze.guard import Guard
from runtime.linux import syscalls
from runtime.spec.config import Spec
from runtime.state.record import State

_CONFIG = "criu.conf"


@dataclass
class Aftermath:
    """What a dump that was rolled back leaves for the report of the failure."""

    criu_log: bytes = b""
    damage: str = ""  # what could not be repaired, in words


@dataclass(frozen=True)
class Frozen:
    """A container at `post-dump`: frozen, its images complete. It was frozen at `at` (time.monotonic()).

    `lazy`: memory that exists and was not sent with the pages: pid in the container -> ranges of addresses.
    """

    id: str
    dump: Dump
    at: float
    timeout: float
    pages: protocol.PagesEnd
    lazy: dict[int, list[Range]]

    @property
    def deadline(self) -> float:
        """When it must be thawed at the latest (time.monotonic())."""
        return self.at + self.timeout

    def left(self) -> float:
        """Return the seconds that it may still be frozen. Raises DeadlineExceeded if there are none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(
                f"container {self.id} has been frozen for {self.timeout:g} s",
                remedy="--timeout SECONDS allows it more time",
            )
        return left


class Switchover:
    """One container that leaves. A context manager: leaving it without `kill_source` rolls back."""

    def __init__(
        self,
        state: State,
        spec: Spec,
        peer: Peer,
        on_bytes: Callable[[int], None],
        *,
        timeout: float,
        tcp_close: bool = False,
        carried: tuple[str, ...] = (),
        lazy: bool = False,
        clean: CleanPages | None = None,
        compress: Compression = Compression.NONE,
        shared: Objects | None = None,
    ) -> None:
        """Start what can be started before the freeze, which may last `timeout` seconds.

        `carried`: mount points whose contents are sent separately, not in the images. `lazy`: so is all memory that a
        restore need not wait for; `Frozen.lazy` lists it. `clean`: what of it CRIU need not pin. `shared`: shared
        memory that was sent ahead.
        """
        self._state, self._spec, self._peer, self._timeout = state, spec, peer, timeout
        self._carrier = Carrier(peer.send_pages, digest=peer.digest, compress=compress)
        self._relay = PageRelay(Criu().version(), self._carrier, on_bytes, shared, clean)
        self._images = syscalls.detached_tmpfs(mode=0o700)  # and CRIU's log
        self._tcp_close, self._carried, self._lazy = tcp_close, carried, lazy
        self._clean = clean
        if clean is not None:
            make_parent(self._images)
        self._watched = watches.names(state.pid)
        self._gate = contextlib.ExitStack()  # opened after the thaw: opening takes 15 ms
        self._until_dump = contextlib.ExitStack()  # closes the guard, unless a dump has taken it over
        self._guard = self._until_dump.enter_context(contextlib.closing(Guard(state)))
        self._thaw: Callable[[], None] = lambda: None
        self._reap: Callable[[], None] = lambda: None
        self._damage = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.roll_back()
        self._until_dump.close()
        self._relay.close()
        os.close(self._images)

    @contextlib.contextmanager
    def undone_by_failure(self, aftermath: Aftermath) -> Iterator[None]:
        """Roll back when the block raises. This has no effect on a container that has been killed."""
        try:
            yield
        except BaseException:
            with uninterruptible():
                self.roll_back()
                aftermath.criu_log, aftermath.damage = self._log(), self._damage
            raise

    def close_gate(self) -> None:
        """Let nobody open a new connection to the container until it is thawed."""
        self._gate.enter_context(syn_gate.closed(self._state, self._spec))

    @faults.point("freeze")
    def freeze(
        self,
        on_frozen: Callable[[], None] = lambda: None,
        *,
        before: Callable[[], None] = lambda: None,
        skip_in_flight: bool = False,
    ) -> Frozen:
        """Dump up to `post-dump`, while pages stream. Afterwards the tree is frozen and its images are complete.

        `before` is called right before CRIU begins to freeze processes. `on_frozen` is called once no process of the
        container runs, while the dump continues. With `skip_in_flight`, connections that have not been accepted yet are
        left out: they are lost.
        """
        options = criu_options.dump_options(
            self._state,
            self._spec,
            self._carried,
            images_dir_fd=self._images,
            work_dir_fd=self._images,
            page_server_fd=self._relay.criu_end.fileno(),
            lazy_pages=self._lazy,
            config_file=self._page_server_config() if self._lazy else None,
            tcp_skip_in_flight=skip_in_flight,
            irmap_scan_paths=self._watched,
            track_mem=self._clean is not None,
            parent_img=PARENT if self._clean is not None else None,
        )
        self._relay.start()
        environment = tar_images.environment()
        self._until_dump.pop_all()
        dump = Dump(self._state, self._spec, options, timeout=self._timeout, guard=self._guard, env=environment)
        self._thaw = dump.roll_back
        self._relay.criu_end.close()
        try:
            with faults.point("criu pre-dump"):
                dump.run_until("pre-dump")
            before()
            frozen_at = time.monotonic()
            with faults.point("criu query-ext-files"):
                # Whichever comes first. 3.17 sends only network-lock, and only of a network of the container's own.
                reached = dump.run_until("network-lock", "query-ext-files", "post-dump")
                on_frozen()
                if reached == "network-lock":
                    reached = dump.run_until("query-ext-files", "post-dump")
            if reached != "post-dump":
                dump.run_until("post-dump")
            dump.complete(self._images, keep=not self._tcp_close)
        except SwrkDied:
            raise
        except (CriuError, DeadlineExceeded) as error:
            raise self._relay.failure or error from None
        pages = self._relay.finish(max(0.0, frozen_at + self._timeout - time.monotonic()))
        return Frozen(self._state.id, dump, frozen_at, self._timeout, pages, self._relay.lazy)

    def _page_server_config(self) -> str:
        """Write a configuration file for CRIU beside its images, and return its path."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        with open(os.open(_CONFIG, flags, 0o600, dir_fd=self._images), "w") as file:
            file.write(page_server_config(self._relay.criu_end.fileno()))
        return f"/proc/{os.getpid()}/fd/{self._images}/{_CONFIG}"

    @faults.point("send-images")
    def send_images(self, deadline: float) -> int:
        """Send every image except the pages, until `deadline` (time.monotonic()). Return how many there are."""
        names = sorted(name for name in os.listdir(self._images) if name.endswith(".img"))
        for name in names:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._images)
            with open(fd, "rb") as file:
                seen, size = hashlib.sha256(), 0
                self._peer.post(protocol.Image(name))
                for data in tar_images.contents(name, file):
                    seen.update(data)
                    size += len(data)
                    for start in range(0, len(data), frames.CHUNK):
                        if time.monotonic() > deadline:
                            raise DeadlineExceeded("the images could not be sent in time")
                        self._peer.send_data(data[start : start + frames.CHUNK])
                self._peer.post(protocol.ImageEnd(size, seen.hexdigest()))
        return len(names)

    def kill_source(
        self, frozen: Frozen, on_killed: Callable[[], None], warn: Callable[[str], None], *, shares_files: bool
    ) -> None:
        """End the frozen tree. `on_killed` is called as soon as its end is certain, and then this need not wait for it.

        It waits, as `reap` does, where the last acts of an exit concern others: in a network that is not the
        container's own, and if the target has the same files (`shares_files`), which closing them may still write to.
        Raises DeadlineExceeded.
        """
        wait = shares_files or not self._spec.is_new("network")
        self._reap = frozen.dump.reap
        end_source(self._state, self._spec, lambda: frozen.dump.kill(self._peer.name, on_killed, wait=wait), warn)

    def reap(self) -> None:
        """Wait until none of the killed processes exists. Raises DeadlineExceeded."""
        self._reap()

    def roll_back(self) -> None:
        """Thaw the tree, which then runs as before. Harmless when it is not frozen."""
        try:
            self._thaw()
        except Error as error:
            self._damage = str(error)
        self._gate.close()

    @property
    def carried_bytes(self) -> tuple[int, int]:
        """Return the bytes of CRIU's page stream so far, before and after compression."""
        return self._carrier.size, self._carrier.sent

    def dropped_watches(self) -> int:
        """Return how many inotify and fanotify descriptors had unread events: CRIU does not carry those."""
        return self._log().count(b"events will be dropped")

    def _log(self) -> bytes:
        """Return CRIU's log of the dump, b"" if there is none."""
        try:
            with open(os.open("dump.log", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._images), "rb") as file:
                return file.read()
        except OSError:
            return b""
