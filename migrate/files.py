"""File trees: recognising one by a fingerprint, measuring it, and sending it with rsync over our connection."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from migrate.errors import DeadlineExceeded, HostError, MigrateError, NoSpace
from runtime import selfexec

_CHUNK = 1 << 18
_STOP_TIMEOUT = 10.0
_STATUS_TIMEOUT = 3.0


class Channel(Protocol):
    """A command that runs at the target, as a byte stream."""

    def sendall(self, data: bytes) -> None: ...
    def recv(self, size: int) -> bytes: ...
    def shutdown_write(self) -> None: ...
    def exit_status(self, timeout: float = ...) -> int:
        """-1 when it is not known within `timeout` seconds."""
        ...

    def errors(self) -> str:
        """What the command has written to stderr, once it has ended."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SentTree:
    """What a run of rsync cost: bytes over the connection, seconds, and how many files' contents went.

    `complaints` is what rsync said of files that it could not read as it had listed them; "" when all went well.
    `names` are those it has touched at the target or failed to read, relative to the tree; only of a `living` tree.
    """

    bytes_sent: int
    seconds: float
    files: int = 0
    complaints: str = ""
    names: frozenset[bytes] = frozenset()


def fingerprint(root: Path) -> str:
    """SHA-256 over every entry's path, type, mode, owner, size, mtime (ns), link target and device number.

    Contents are not read: this is what rsync compares too, and more than CRIU checks (size, mtime, build-id). Times and
    sizes of directories are left out, the root's own mode as well. Raises MigrateError.
    """
    seen = hashlib.sha256()
    try:
        for path, info in _walk(os.fspath(root)):
            parts: list[object] = [stat.S_IFMT(info.st_mode), stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid]
            if stat.S_ISREG(info.st_mode):
                parts += [info.st_size, info.st_mtime_ns]
            elif stat.S_ISLNK(info.st_mode):
                parts.append(os.readlink(path))
            elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
                parts.append(info.st_rdev)
            entry = os.fsencode(os.path.relpath(path, root)) + b"\0" + repr(parts).encode()
            seen.update(len(entry).to_bytes(4, "big") + entry)
    except OSError as error:
        raise MigrateError(f"{error.filename or root}: cannot be read: {error.strerror}") from None
    return seen.hexdigest()


def size(root: Path) -> int:
    """Bytes that a tree takes on disk, files with several links counted once. Raises MigrateError."""
    total, counted = 0, set()
    try:
        for _, info in _walk(os.fspath(root), living=True):
            if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
                if (info.st_dev, info.st_ino) in counted:
                    continue
                counted.add((info.st_dev, info.st_ino))
            total += info.st_blocks * 512
    except OSError as error:
        raise MigrateError(f"{error.filename or root}: cannot be read: {error.strerror}") from None
    return total


def _walk(root: str, *, living: bool = False) -> "list[tuple[str, os.stat_result]]":
    """Every entry below `root` in a fixed order, not following links; of a file only itself.

    Of a `living` tree something may vanish meanwhile.
    """
    if not stat.S_ISDIR(os.stat(root).st_mode):
        return [(root, os.stat(root))]
    found = []
    pending = [root]
    while pending:
        directory = pending.pop()
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    found.append((entry.path, entry.stat(follow_symlinks=False)))
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except FileNotFoundError:
            if not living or directory == root:
                raise
    return sorted(found, key=lambda item: os.fsencode(item[0]))


def send_tree(
    open_channel: Callable[[str], Channel],
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

    `deadline` is a time.monotonic(). Raises NoSpace, MigrateError (rsync's own last words), HostError,
    DeadlineExceeded; the local rsync is gone in any case. Of a `living` tree it is no failure that files change or
    vanish while they are read, and no link in it is followed (`guarded`). `within` is as in Rsync.
    """
    said = ("--out-format=%i %n",) if living else ()
    options = ("--delete", *said, *options)
    with Rsync(
        open_channel, source, destination, options, on_progress=on_progress, guarded=living and guarded, within=within
    ) as rsync:
        return rsync.finish(deadline, living=living)


class Rsync:
    """One run of rsync, from its start to its end; leaving it as a context manager ends it.

    With `names` it has connected already, and waits for the names of what has changed: `finish` gives it those. A name
    that does not exist here is removed there. `guarded`: it follows no link in the tree, whatever comes there. `within`
    is a command that becomes the one that it is given at the target.
    """

    def __init__(
        self,
        open_channel: Callable[[str], Channel],
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
        self._source, self._started = source, time.monotonic()
        listed = ("--files-from=-", "--from0", "--delete-missing-args", "--ignore-times") if names else ()
        ours, theirs = socket.socketpair()
        argv = [
            *(selfexec.command("migrate.sender", str(source)) if guarded else ()),
            rsync, "-aHAX", "--numeric-ids", "--sparse", "--force", "--modify-window=-1", "--protect-args",
            "--no-motd", "--stats", "--no-human-readable", *listed, *options,
            f"--rsh={shlex.join(selfexec.command('migrate.rsh', str(theirs.fileno())))}",
            f"{source}/", f"target:{destination}/",
        ]  # fmt: skip
        with theirs:
            self._process = subprocess.Popen(
                argv, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE if names else subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
        self._relay = _Relay(ours, open_channel, on_progress, within)
        self._relay.start()

    def __enter__(self) -> "Rsync":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connected(self, timeout: float) -> None:
        """Wait until the rsync at the target speaks, at most `timeout` seconds; `finish` tells if it does not."""
        self._relay.answered.wait(timeout)

    def finish(self, deadline: float, *, living: bool = False, names: bytes | None = None) -> SentTree:
        """Wait until the tree is there. `names`, each ended by a zero byte, are those of what has changed.

        Raises as `send_tree` does. The time is counted from here when there are names, from the start otherwise.
        """
        if names is not None:
            self._started = time.monotonic()
        try:
            said, words = self._process.communicate(names, timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(f"rsync of {self._source} did not end in time") from None
        relay, status = self._relay, self._process.returncode
        relay.join()
        if relay.failure is not None:
            raise relay.failure
        text = words.decode(errors="replace") + relay.errors
        if status != 0 and not (living and status in _PARTIAL and _is_life(text)):
            raise _explain(self._source, status, text, relay.exit_status)
        count = _TRANSFERRED.search(said)
        return SentTree(
            relay.sent,
            time.monotonic() - self._started,
            int(count[1]) if count else 0,
            text if status else "",
            _named(said, words, os.fsencode(self._source)) if living else frozenset(),
        )

    def close(self) -> None:
        """End it, wherever it is. Harmless when it has ended."""
        self._process.kill()
        self._relay.close()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _named(said: bytes, words: bytes, source: bytes) -> frozenset[bytes]:
    """The names in what rsync says of its work (--out-format) and of what it could not read (a quoted path)."""
    found = {match[1] for match in _ITEM.finditer(said)}
    prefix = source + b"/"
    quoted = (match[1] for match in _QUOTED.finditer(words))
    found |= {path[len(prefix) :] for path in quoted if path.startswith(prefix)}
    return frozenset(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), name).rstrip(b"/") for name in found)


_ITEM = re.compile(rb"^[<>ch.][fdLDS][^ \n]{9} (.*)$", re.MULTILINE)
_QUOTED = re.compile(rb'"(/.*)"')
_ESCAPE = re.compile(rb"\\#([0-3][0-7]{2})")  # how rsync writes what is not printable
_PARTIAL = (23, 24)  # rsync(1): some files were not transferred; some vanished
_TRANSFERRED = re.compile(rb"^Number of regular files transferred: (\d+)", re.MULTILINE)
# What rsync says of a file that is removed, cut short or written to while it is sent.
_LIFE = re.compile(
    r"(file|directory) has vanished: |.* failed verification -- update |.*: No such file or directory \(2\)$"
    r"|.*read errors mapping .*: No data available|.*No data available \(61\)$|rsync warning: some files vanished"
    r"|rsync error: some files"
    r"|IO error encountered -- skipping file deletion"
    r"|cannot delete non-empty directory: "
    r"|.*: Too many levels of symbolic links \(40\)$"
)


def _is_life(words: str) -> bool:
    """Whether everything that rsync complains of comes of files that change while they are sent."""
    return all(_LIFE.match(line) for line in words.splitlines() if line.strip())


class _Relay:
    """Between rsync's remote-shell process and a channel of the connection, on two threads."""

    def __init__(
        self,
        sock: socket.socket,
        open_channel: Callable[[str], Channel],
        on_progress: Callable[[int], None],
        within: tuple[str, ...],
    ) -> None:
        self._sock, self._open, self._on_progress, self._within = sock, open_channel, on_progress, within
        self._channel: Channel | None = None
        self._thread = threading.Thread(target=self._run, name="rsync-relay", daemon=True)
        self.answered = threading.Event()  # by the remote command, or it never will
        self.sent = 0
        self.failure: MigrateError | None = None
        self.exit_status: int | None = None
        self.errors = ""

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join(_STOP_TIMEOUT)

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
            self._channel = channel = self._open(shlex.join([*self._within, *command]))
            back = threading.Thread(target=self._back, args=(channel,), name="rsync-relay-back", daemon=True)
            back.start()
            data = rest or self._sock.recv(_CHUNK)
            while data:
                channel.sendall(data)
                self.sent += len(data)
                self._on_progress(self.sent)
                data = self._sock.recv(_CHUNK)
            channel.shutdown_write()
            back.join()
            self.exit_status = channel.exit_status()
        except MigrateError as error:
            self.failure = error
        except OSError as error:
            # A command that ended early breaks the stream as well: its exit status tells the two apart.
            self.exit_status = self._channel.exit_status(_STATUS_TIMEOUT) if self._channel else -1
            if self.exit_status == -1:
                self.failure = HostError(f"the connection was lost while files were sent: {error}")
        finally:
            self.answered.set()
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            if self._channel is not None and self.exit_status not in (None, -1):
                self.errors = self._channel.errors()

    def _command(self) -> tuple[list[str] | None, bytes]:
        """The remote command that rsync asks for, and what has come after it; None when rsync failed before."""
        line = b""
        while b"\n" not in line:
            data = self._sock.recv(_CHUNK)
            if not data:
                return None, b""
            line += data
        first, _, rest = line.partition(b"\n")
        return json.loads(first), rest

    def _back(self, channel: Channel) -> None:
        with contextlib.suppress(OSError):
            while data := channel.recv(_CHUNK):
                self.answered.set()
                self._sock.sendall(data)
            self._sock.shutdown(socket.SHUT_WR)


def _explain(source: Path, status: int, words: str, remote_status: int | None) -> MigrateError:
    """rsync's exit status and last words as one error."""
    lines = [line for line in words.strip().splitlines() if not line.startswith("rsync error:")] or words.splitlines()[
        -1:
    ]
    for line in lines:
        if "No space left on device" in line or "Disk quota exceeded" in line:
            text = f"no room at the target for {source}: {line}"
            return NoSpace(text, remedy="make room at the target, on the disk of that file")
    if remote_status == 127:
        return MigrateError("rsync is not installed at the target", remedy="apt-get install rsync there")
    return MigrateError(f"rsync of {source} failed with status {status}: {'; '.join(lines[-3:])}")
