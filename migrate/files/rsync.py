"""Send a file tree with rsync over the move's connection, and watch each run from start to end."""

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from criu_rpc.errors import Error
from migrate.errors import DeadlineExceeded, HostError, MigrateError, NoSpace, ProtocolError
from migrate.files import receivers, rsh
from migrate.limits import RSYNC_STATUS_TIMEOUT, RSYNC_STOP_TIMEOUT, RSYNC_WORDS_TIMEOUT, STALL_TIMEOUT
from runtime.linux import processes, selfexec

# Seconds without a process that computes, reads or writes for a run of rsync. Its own --timeout is not enough: with
# one of its two processes at the target stopped, or the one here, the others wait forever.
SAID_LIMIT = 256 << 20  # bytes of rsync's output: the names of four million files, or errors
_WATCH_INTERVAL = 0.5
_CHUNK = 1 << 18


class Channel(Protocol):
    """A command that runs at the target, as a byte stream."""

    def sendall(self, data: bytes) -> None: ...
    def recv(self, size: int) -> bytes: ...
    def shutdown_write(self) -> None: ...
    def exit_status(self, timeout: float = ...) -> int | None:
        """Return the exit status; -1 if a signal killed the command, None if it is unknown after `timeout` seconds."""
        ...

    def errors(self) -> str:
        """Return what the command has written to stderr, once it has exited."""
        ...

    def close(self) -> None: ...


class Target(Protocol):
    """The other host, as this module needs it."""

    @property
    def name(self) -> str: ...

    def open_channel(self, command: str) -> Channel: ...

    def signs(self) -> object:
        """Return a value that changes while a process there receives files. Raises HostError if it is unknown."""
        ...

    def is_silent(self) -> bool:
        """Return whether the host does not answer at all."""
        ...


@dataclass(frozen=True)
class SentTree:
    """The cost of an rsync run: bytes over the connection, seconds, and the number of files whose contents were sent.

    `complaints`: rsync's messages about files that it could not read as listed; "" if there were none. `names`: files
    that it changed at the target or failed to read, relative to the tree; only for a `living` tree.
    """

    bytes_sent: int
    seconds: float
    files: int = 0
    complaints: str = ""
    names: frozenset[bytes] = frozenset()


def send_tree(
    target: Target,
    source: Path,
    destination: str,
    *,
    on_progress: Callable[[int], None],
    deadline: float,
    options: tuple[str, ...] = (),
    living: bool = False,
    guarded: bool = True,
    within: tuple[str, ...] = (),
) -> SentTree:
    """Make the directory `destination` at the target equal to `source`, with everything a root file system can hold.

    `deadline` is a time.monotonic(). In a `living` tree files may change or vanish while they are read, and no link is
    followed (`guarded`). `within`: see Rsync. Raises NoSpace, MigrateError (naming the part that was killed, or with
    rsync's last messages), HostError, DeadlineExceeded (also if nothing happens for STALL_TIMEOUT); the local rsync has
    exited in any case.
    """
    said = ("--out-format=%i %n",) if living else ()
    options = ("--delete", *said, *options)
    with Rsync(
        target, source, destination, options, on_progress=on_progress, guarded=living and guarded, within=within
    ) as rsync:
        return rsync.finish(deadline, living=living)


class Rsync:
    """One run of rsync; as a context manager it is killed on leaving.

    With `names` it connects at once and waits for the names of changed files, which `finish` passes on. A name that
    does not exist here is removed at the target. `guarded`: it follows no link in the tree, even one that appears
    later. `within`: the command prefix for rsync at the target.
    """

    def __init__(
        self,
        target: Target,
        source: Path,
        destination: str,
        options: tuple[str, ...],
        *,
        on_progress: Callable[[int], None],
        names: bool = False,
        guarded: bool = False,
        within: tuple[str, ...] = (),
    ) -> None:
        rsync = shutil.which("rsync")
        if rsync is None:
            raise MigrateError("rsync is not installed here", remedy="apt-get install rsync, here and at the target")
        self._target, self._source, self._started = target, source, time.monotonic()
        listed = ("--files-from=-", "--from0", "--delete-missing-args", "--ignore-times") if names else ()
        ours, theirs = socket.socketpair()
        argv = [
            *(selfexec.command("migrate.files.no_follow", str(source)) if guarded else ()),
            rsync, "-aHAX", "--numeric-ids", "--sparse", "--force", "--modify-window=-1", "--protect-args",
            "--no-motd", "--stats", "--no-human-readable", *listed, *options,
            f"--rsh={shlex.join(selfexec.command('migrate.files.rsh', str(theirs.fileno())))}",
            f"{source}/", f"target:{destination}/",
        ]  # fmt: skip
        # The target decides how much rsync prints, so its output goes to files, whose size can be limited.
        self._said, self._words = (open(os.memfd_create(name), "w+b") for name in ("stdout", "stderr"))
        with theirs:
            self._process = subprocess.Popen(
                argv, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE if names else subprocess.DEVNULL,
                stdout=self._said, stderr=self._words, start_new_session=True,
                env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (SAID_LIMIT, SAID_LIMIT))
        self._relay = _Relay(ours, target, on_progress, within)
        self._relay.start()

    def __enter__(self) -> "Rsync":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connected(self, timeout: float) -> None:
        """Wait until the target's rsync answers, at most `timeout` seconds; if it does not, `finish` raises."""
        self._relay.answered.wait(timeout)

    def finish(self, deadline: float, *, living: bool = False, names: bytes | None = None) -> SentTree:
        """Wait until the tree is sent. `names`: those of changed files, each followed by a zero byte.

        Raises as `send_tree` does. With names the time is counted from here, otherwise from the start.
        """
        if names is not None:
            self._started = time.monotonic()
        said, words = self._communicate(deadline, names)
        relay, status = self._relay, self._process.returncode
        relay.join(min(RSYNC_WORDS_TIMEOUT if status else RSYNC_STOP_TIMEOUT, max(0.1, deadline - time.monotonic())))
        text = words.decode(errors="replace") + relay.errors
        if status >= 0 and relay.failure is not None and not relay.ended_here:
            raise relay.failure
        if status != 0 and not (living and status in _PARTIAL and _is_life(text)):
            raise self._explain(status, text)
        if relay.failure is not None:
            raise relay.failure
        if relay.exit_status is None:
            raise DeadlineExceeded(f"rsync of {self._source} did not exit at {self._target.name}")
        count = _TRANSFERRED.search(said)
        return SentTree(
            relay.sent,
            time.monotonic() - self._started,
            int(count[1]) if count else 0,
            text if status else "",
            _named(said, words, os.fsencode(self._source)) if living else frozenset(),
        )

    def _communicate(self, deadline: float, names: bytes | None) -> tuple[bytes, bytes]:
        """Wait until rsync exits, and watch all processes of the run; return its stdout and stderr."""
        ended, failures = threading.Event(), list[Error]()
        watch = threading.Thread(target=self._watch, args=(ended, failures), name="rsync-watch", daemon=True)
        watch.start()
        try:
            self._process.communicate(names, timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(f"rsync of {self._source} did not exit in time") from None
        finally:
            ended.set()
            watch.join()
        for failure in failures:
            raise failure
        said, words = _contents(self._said), _contents(self._words)
        if max(len(said), len(words)) >= SAID_LIMIT:  # rsync continues, but the rest of its output is lost
            raise ProtocolError(
                f"{self._target.name}: rsync there printed more than {SAID_LIMIT} bytes about {self._source}"
            )
        return said, words

    def _watch(self, ended: threading.Event, failures: list[Error]) -> None:
        """Kill rsync when the target is lost or nothing happens, with the reason in `failures`; return at its end."""
        seen, since = None, time.monotonic()
        while not ended.wait(_WATCH_INTERVAL):
            try:
                family = processes.descendants(self._process.pid)
                signs = (sum(map(processes.activity, family)), self._target.signs())
                if signs != seen:
                    seen, since = signs, time.monotonic()
                elif time.monotonic() - since > STALL_TIMEOUT:
                    raise self._stalled(family)
            except Error as error:
                failures.append(error)
                self._process.kill()
                return

    def _stalled(self, family: set[int]) -> DeadlineExceeded:
        stopped = sorted(filter(processes.is_stopped, family))
        if stopped:
            part = "rsync" if stopped[0] == self._process.pid else "rsync's remote shell"
            why = f"{part} (process {stopped[0]}) is stopped"
        elif self._target.is_silent():
            why = f"{self._target.name} does not answer"
        else:
            why = f"rsync at {self._target.name} does nothing"
        return DeadlineExceeded(f"rsync of {self._source} has not moved for {STALL_TIMEOUT:g} s: {why}")

    def _explain(self, status: int, words: str) -> MigrateError:
        """Return rsync's exit status and last messages as one error, or name the part that exited first."""
        source, there, remote = self._source, self._target.name, self._relay.exit_status
        said = words.strip().splitlines()
        lines = [line for line in said if not line.startswith("rsync error:")] or said[-1:]
        if status < 0:
            return MigrateError(f"rsync of {source} was killed by {_signal(-status)}")
        for line in lines:
            if "No space left on device" in line or "Disk quota exceeded" in line:
                text = f"no room at {there} for {source}: {line}"
                return NoSpace(text, remedy=f"make room at {there}, on the disk of that file")
        if remote == 127:
            return MigrateError("rsync is not installed at the target", remedy="apt-get install rsync there")
        if remote == receivers.REFUSED:
            return MigrateError(f"{there} no longer accepts files of this move")
        if failed := [line for line in lines if line.startswith(f"{rsh.NAME}: ")]:
            return MigrateError(f"rsync of {source} failed: {failed[0]}")
        if status in _BROKEN and self._relay.ended_here:
            return MigrateError(f"{rsh.NAME} for {source} was killed")
        if remote is not None and (remote < 0 or remote > 128):
            return MigrateError(f"rsync at {there} was killed{f' by {_signal(remote - 128)}' if remote > 0 else ''}")
        what = f"rsync of {source} failed with status {status}"
        if remote and (status in _BROKEN or status == remote == _TOLD):
            what = f"rsync at {there} exited with status {remote}"
        return MigrateError(f"{what}: {'; '.join(lines[-3:])}")

    def close(self) -> None:
        """Kill rsync and close the connection. Harmless if it has exited."""
        self._process.kill()
        self._relay.close()
        self._process.wait()
        for stream in (self._process.stdin, self._said, self._words):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _contents(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def _named(said: bytes, words: bytes, source: bytes) -> frozenset[bytes]:
    """Return the names in rsync's list of its work (--out-format) and in its errors (quoted paths)."""
    found = {match[1] for match in _ITEM.finditer(said)}
    prefix = source + b"/"
    quoted = (match[1] for match in _QUOTED.finditer(words))
    found |= {path[len(prefix) :] for path in quoted if path.startswith(prefix)}
    return frozenset(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), name).rstrip(b"/") for name in found)


_ITEM = re.compile(rb"^[<>ch.][fdLDS][^ \n]{9} (.*)$", re.MULTILINE)
_QUOTED = re.compile(rb'"(/.*)"')
_ESCAPE = re.compile(rb"\\#([0-3][0-7]{2})")  # rsync's form of bytes that are not printable
_BROKEN = (10, 12, 13, 14)  # rsync(1): errors in socket I/O, protocol, diagnostics, or IPC: the other end is gone
_TOLD = 20  # a signal told it to exit
_PARTIAL = (23, 24)  # some files were not transferred; some vanished
_TRANSFERRED = re.compile(rb"^Number of regular files transferred: (\d+)", re.MULTILINE)
# rsync's messages about a file that is removed, truncated or written to while it is sent.
_LIFE = re.compile(
    r"(file|directory) has vanished: |.* failed verification -- update |.*: No such file or directory \(2\)$"
    r"|.*read errors mapping .*: No data available|.*No data available \(61\)$|rsync warning: some files vanished"
    r"|rsync error: some files"
    r"|IO error encountered -- skipping file deletion"
    r"|cannot delete non-empty directory: "
    r"|.*: Too many levels of symbolic links \(40\)$"
)


def _is_life(words: str) -> bool:
    """Return whether all of rsync's messages are about files that change while they are sent."""
    return all(_LIFE.match(line) for line in words.splitlines() if line.strip())


def _signal(number: int) -> str:
    return signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"


class _Relay:
    """A relay between rsync's remote-shell process and a channel of the connection, on two threads."""

    def __init__(
        self,
        sock: socket.socket,
        target: Target,
        on_progress: Callable[[int], None],
        within: tuple[str, ...],
    ) -> None:
        self._sock, self._target, self._on_progress, self._within = sock, target, on_progress, within
        self._channel: Channel | None = None
        self._thread = threading.Thread(target=self._run, name="rsync-relay", daemon=True)
        self.answered = threading.Event()  # the remote command has answered, or never will
        self.sent = 0
        self.failure: Error | None = None
        self.exit_status: int | None = None  # as a Channel has it
        self.ended_here = False  # this end closed before the target's
        self._ended_there = False
        self.errors = ""

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float = RSYNC_STOP_TIMEOUT) -> None:
        self._thread.join(timeout)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._channel is not None:
            self._channel.close()
        self.join()
        self._sock.close()

    def _run(self) -> None:
        try:
            command, rest = self._command()
            if command is None:
                return
            self._channel = channel = self._target.open_channel(shlex.join([*self._within, *command]))
            back = threading.Thread(target=self._back, args=(channel,), name="rsync-relay-back", daemon=True)
            back.start()
            data = rest or self._from_rsync()
            while data:
                channel.sendall(data)
                self.sent += len(data)
                self._on_progress(self.sent)
                data = self._from_rsync()
            self.ended_here = not self._ended_there
            channel.shutdown_write()
            back.join()
            self.exit_status = channel.exit_status()
        except Error as error:
            self.failure = error
        except OSError as error:
            # A command that exits early breaks the stream too; its exit status tells it from a lost connection.
            self.exit_status = self._channel.exit_status(RSYNC_STATUS_TIMEOUT) if self._channel else None
            if self.exit_status is None:
                self.failure = HostError(f"{self._target.name}: the connection was lost while files were sent: {error}")
        finally:
            self.answered.set()
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            if self._channel is not None and self.exit_status is not None:
                self.errors = self._channel.errors()

    def _command(self) -> tuple[list[str] | None, bytes]:
        """Return the remote command that rsync asks for, and the bytes after it; None if rsync failed before."""
        line = b""
        while b"\n" not in line:
            data = self._from_rsync()
            if not data:
                return None, b""
            line += data
        first, _, rest = line.partition(b"\n")
        return json.loads(first), rest

    def _from_rsync(self) -> bytes:
        """Return the next bytes from the remote shell, b"" at its end, also if it died with unread data (a reset)."""
        try:
            return self._sock.recv(_CHUNK)
        except ConnectionResetError:
            return b""

    def _back(self, channel: Channel) -> None:
        with contextlib.suppress(OSError):
            while data := channel.recv(_CHUNK):
                self.answered.set()
                self._sock.sendall(data)
            self._ended_there = True
            self._sock.shutdown(socket.SHUT_WR)
