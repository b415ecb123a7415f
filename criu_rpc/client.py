"""CRIU as an object: short requests are methods; dump and restore are sessions with notifications."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from criu_rpc import logs, messages, swrk
from criu_rpc.errors import BadAnswer, CriuError, CriuTooOld, DeadlineExceeded, RequestFailed, SwrkDied, overdue
from criu_rpc.limits import REQUEST_TIMEOUT
from criu_rpc.options import DumpOptions, RestoreOptions
from criu_rpc.swrk import PageServer, Swrk

OLDEST = (3, 17)
_SHORT_LOG = "criu.log"


class Version(NamedTuple):
    """CRIU's version; compares as a tuple, prints as "4.2.1"."""

    major: int
    minor: int
    sublevel: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}" + (f".{self.sublevel}" if self.sublevel else "")


@dataclass(frozen=True)
class Features:
    """What CRIU and the kernel support: dirty page tracking, lazy pages (userfaultfd), pidfd store."""

    mem_track: bool
    lazy_pages: bool
    pidfd_store: bool


@dataclass(frozen=True)
class Notification:
    """CRIU waits at a point of its work. `pid` is the root of the tree if CRIU says it, else 0."""

    script: str
    pid: int
    fd: int | None


class _Session:
    """One long request with notifications. A context manager: leaving it aborts an unfinished session."""

    _last: ClassVar[str]  # the notification at which CRIU can be refused for the last time

    def __init__(self, connection: Swrk, request: str, work_dir_fd: int, log_file: str, timeout: float) -> None:
        self._swrk, self._request = connection, request
        self._work, self._log = os.dup(work_dir_fd), log_file
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._waiting = False
        self._over = False
        self.pid = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def next(self, timeout: float | None = None) -> Notification | None:
        """Return the next notification, which CRIU waits for an answer to; None when the request has succeeded.

        Raises RequestFailed, SwrkDied, BadAnswer, DeadlineExceeded; the session is over then.
        """
        left = self._deadline - time.monotonic()
        rpc = messages.rpc()
        try:
            answer, fd = self._swrk.recv(self._request, left if timeout is None else min(left, timeout))
            if answer.type == rpc.NOTIFY:
                self._waiting = True
                self.pid = answer.notify.pid or self.pid
                return Notification(answer.notify.script, answer.notify.pid, fd)
            if fd is not None:
                os.close(fd)
            if answer.type not in (rpc.DUMP, rpc.RESTORE, rpc.PRE_DUMP, rpc.SINGLE_PRE_DUMP):
                raise BadAnswer(self._request, f"a message of type {answer.type}")
            if not answer.success:
                lines, log = logs.tail(self._work, self._log)
                raise RequestFailed(self._request, answer.cr_errno, log_tail=lines, log_path=log)
        except DeadlineExceeded:
            self._swrk.kill()
            self._end()
            raise overdue(self._request, timeout or self._timeout) from None
        except SwrkDied as error:
            raise self._died(error) from None
        except CriuError:
            self._end()
            raise
        if answer.HasField("restore"):
            self.pid = answer.restore.pid
        self._end()
        return None

    def prolong(self, timeout: float) -> None:
        """Give the rest of the request `timeout` seconds from now."""
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout

    def ack(self) -> None:
        """Let CRIU continue from the notification that it waits at."""
        self._answer(True)

    def refuse(self) -> None:
        """Make CRIU fail at the notification it waits at: a dump is undone, a restored tree killed."""
        self._answer(False)

    def run_until(self, *scripts: str, take: Callable[[int], None] | None = None) -> Notification:
        """Let CRIU continue to the first of the notifications `scripts`, and leave that unanswered.

        Not all versions send all of them, so CRIU is stopped at the last notification that it can be refused at:
        reaching that first raises BadAnswer. `take` gets the descriptors that come on the way (orphan-pts-master);
        without `take` they are closed.
        """
        if self._waiting:
            self.ack()
        wanted = " or ".join(scripts)
        while (notification := self.next()) is not None:
            if notification.fd is not None:
                take(notification.fd) if take is not None else os.close(notification.fd)
            if notification.script in scripts:
                return notification
            if notification.script == self._last:
                raise BadAnswer(self._request, f"{self._last} before {wanted}")
            self.ack()
        raise BadAnswer(self._request, f"success before {wanted}")

    def finish(self) -> None:
        """Let CRIU continue to the end of the request."""
        if self._waiting:
            self.ack()
        while self.next() is not None:
            self.ack()

    def require_alive(self) -> None:
        """Raise SwrkDied if CRIU exited while it waited for this process; the session is over then."""
        try:
            self._swrk.require_alive(self._request)
        except SwrkDied as error:
            raise self._died(error) from None

    @property
    def process_id(self) -> int:
        """CRIU's process id; 0 if another process has started it."""
        return self._swrk.process_id

    def abort(self) -> None:
        """Have CRIU undo what it did, and wait until it has exited. Harmless when the session is over."""
        if not self._over:
            self._end()

    def _answer(self, success: bool) -> None:
        rpc = messages.rpc()
        answer = rpc.criu_req()
        answer.type = rpc.NOTIFY
        answer.notify_success = success
        self._waiting = False
        try:
            self._swrk.send(answer, self._request)
        except SwrkDied as error:
            raise self._died(error) from None

    def _died(self, error: SwrkDied) -> SwrkDied:
        """End the session, and return the same error with what CRIU's log says."""
        lines, log = logs.tail(self._work, self._log)
        self._end()
        return SwrkDied(self._request, error.status, log_tail=lines, log_path=log)

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._swrk.close()
            os.close(self._work)


_S = TypeVar("_S", bound=_Session)


class DumpSession(_Session):
    """Notifications: pre-dump, [network-lock], [query-ext-files], post-dump, [network-unlock when it fails].

    CRIU 3.17 sends no query-ext-files.
    """

    _last = "post-dump"


class RestoreSession(_Session):
    """Notifications: pre-restore, setup-namespaces, post-setup-namespaces, post-restore, network-unlock, pre-resume,
    post-resume. `pid` is the restored init once post-restore has come."""

    _last = "post-restore"


class Criu:
    """A criu binary. Each request runs in a CRIU process of its own."""

    def __init__(self, path: str | None = None) -> None:
        """Raises CriuNotFound."""
        self.path = swrk.find(path)

    def version(self) -> Version:
        """Return the version. Raises CriuTooOld below 3.17, which lacks what this package needs."""
        answer = self._exchange("VERSION", "version")
        version = Version(answer.version.major_number, answer.version.minor_number, answer.version.sublevel)
        if version < OLDEST:
            raise CriuTooOld(f"{self.path} is criu {version}; 3.17 or newer is needed")
        return version

    def features(self) -> Features:

        def fill(request: Any) -> None:
            request.features.mem_track = request.features.lazy_pages = request.features.pidfd_store = True

        found = self._exchange("FEATURE_CHECK", "feature check", fill=fill).features
        return Features(bool(found.mem_track), bool(found.lazy_pages), bool(found.pidfd_store))

    def check(self, images_dir_fd: int) -> None:
        """Raise RequestFailed if CRIU cannot work on this kernel. Up to 4.1 it needs a directory for that, too."""
        self._exchange("CHECK", "check", images_dir_fd)

    def cpuinfo_dump(self, images_dir_fd: int) -> None:
        """Write cpuinfo.img of this machine into a directory."""
        self._exchange("CPUINFO_DUMP", "cpuinfo dump", images_dir_fd)

    def cpuinfo_check(self, images_dir_fd: int) -> None:
        """Raise RequestFailed if this machine's processor lacks features that cpuinfo.img in the directory lists."""
        self._exchange("CPUINFO_CHECK", "cpuinfo check", images_dir_fd)

    def pre_dump(self, options: DumpOptions, *, timeout: float) -> None:
        """Make one pre-dump; the tree keeps running. Raises CriuError."""
        with self._start(DumpSession, messages.rpc().SINGLE_PRE_DUMP, "pre-dump", options, timeout) as session:
            session.finish()

    def dump(self, options: DumpOptions, *, timeout: float, env: Mapping[str, str] | None = None) -> DumpSession:
        """Start a dump that must be over within `timeout` seconds, including the time that the caller waits.

        `env` is the environment of CRIU and of the programs that it starts; this process's if not given.
        """
        connection = Swrk.spawn(self.path, pass_fds=options.inherited, env=env)
        return self._start(DumpSession, messages.rpc().DUMP, "dump", options, timeout, connection)

    def restore(self, options: RestoreOptions, *, timeout: float, connection: Swrk | None = None) -> RestoreSession:
        """Start a restore, by a new CRIU or by the one behind `connection`, which is closed at the end."""
        return self._start(RestoreSession, messages.rpc().RESTORE, "restore", options, timeout, connection)

    def page_server(self, images: Path, sock: socket) -> PageServer:
        """Start a page server for one dump, on the connected `sock`."""
        return PageServer.start(self.path, images, sock)

    def _start(
        self,
        kind: type[_S],
        number: int,
        name: str,
        options: DumpOptions | RestoreOptions,
        timeout: float,
        connection: Swrk | None = None,
    ) -> _S:
        request = messages.rpc().criu_req()
        request.type = number
        request.opts.notify_scripts = True
        options.fill(request.opts)
        connection = connection or Swrk.spawn(self.path, pass_fds=options.inherited)
        session = kind(connection, name, options.work_dir_fd, options.log_file, timeout)
        try:
            connection.send(request, name)
        except BaseException:
            session.abort()
            raise
        return session

    def _exchange(
        self, kind: str, name: str, log_dir_fd: int | None = None, fill: Callable[[Any], None] = lambda _: None
    ) -> Any:
        """Make one short request: send it, receive the answer, end the process. `kind` is its name in the messages.

        `fill` completes it; with `log_dir_fd` CRIU works in that directory, and leaves its log there.
        """
        with Swrk.spawn(self.path) as connection:  # first, because it starts while the messages are imported
            request = messages.rpc().criu_req()
            request.type = getattr(messages.rpc(), kind)
            if log_dir_fd is not None:
                request.opts.images_dir_fd = log_dir_fd
                request.opts.log_file = _SHORT_LOG
                request.opts.log_level = 4
            fill(request)
            try:
                connection.send(request, name)
                answer, _ = connection.recv(name, REQUEST_TIMEOUT)
            except DeadlineExceeded:
                connection.kill()
                raise
        if answer.type != request.type:
            raise BadAnswer(name, f"a message of type {answer.type}")
        if not answer.success:
            lines, log = logs.tail(log_dir_fd, _SHORT_LOG) if log_dir_fd is not None else ((), None)
            raise RequestFailed(name, answer.cr_errno, log_tail=lines, log_path=log)
        return answer
