"""Bundles whose config.json is changed field by field, and what their programs print."""

import contextlib
import fcntl
import itertools
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.hosts import PYMIGRATE, write_bundle
from tests.system.conftest import Local

Fields = dict[str, Any]
PATIENCE = 60.0  # seconds
_numbers = itertools.count()


def make(bundle: Path, script: str, fields: Fields | None = None) -> Path:
    """A bundle that runs `script`; `fields` maps paths ("process.user.uid") to values, "x.y+" adds to an array."""
    write_bundle(bundle, script)
    config = json.loads((bundle / "config.json").read_text())
    config["process"]["args"] = ["sh", "-c", script]
    config["root"]["readonly"] = False
    # Tests of others may run at the same time, with containers of the same name.
    config["linux"]["cgroupsPath"] = f"/pymigrate/test-{os.getpid()}-{next(_numbers)}"
    for path, value in (fields or {}).items():
        *parents, last = path.removesuffix("+").split(".")
        target = config
        for name in parents:
            target = target.setdefault(name, {})
        if path.endswith("+"):
            target[last] = [*target.get(last, []), *value]
        elif value is None:
            target.pop(last, None)
        else:
            target[last] = value
    (bundle / "config.json").write_text(json.dumps(config))
    return bundle


def run(
    pymigrate: Local, tmp_path: Path, script: str, fields: Fields | None = None, *flags: object, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """What `run` in the foreground does with a new bundle."""
    bundle = make(tmp_path / f"b{sum(1 for _ in tmp_path.glob('b*'))}", script, fields)
    return pymigrate("run", "-b", bundle, *flags, "c", check=False, **options)


def output(
    pymigrate: Local, tmp_path: Path, script: str, fields: Fields | None = None, *flags: object, **options: Any
) -> str:
    done = run(pymigrate, tmp_path, script, fields, *flags, **options)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def refusal(pymigrate: Local, tmp_path: Path, fields: Fields, *flags: object, script: str = "echo ran") -> str:
    """The one line in which a bundle is refused; nothing ran, and nothing stays."""
    done = run(pymigrate, tmp_path, script, fields, *flags)
    assert (done.returncode != 0, done.stdout) == (True, ""), done
    assert list(pymigrate.root.glob("c*")) == []
    return done.stderr


def namespaces(*kinds: str, **paths: str) -> list[dict[str, str]]:
    """linux.namespaces of new ones and of those with a path; there is always one for mounts."""
    return [{"type": kind} for kind in ("mount", *kinds)] + [{"type": k, "path": p} for k, p in paths.items()]


def wait_for(path: Path, lines: int = 1) -> str:
    """The text of a file, when it has that many lines."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            text = path.read_text()
            if text.count("\n") >= lines:
                return text
        time.sleep(0.005)
    raise AssertionError(f"{path} is not written")


@contextlib.contextmanager
def running(*argv: object, **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """A process that does not outlive the test."""
    process = subprocess.Popen(list(map(str, argv)), text=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def foreground(pymigrate: Local, *argv: object, **options: Any) -> Iterator["subprocess.Popen[str]"]:
    with running(*PYMIGRATE, "--root", pymigrate.root, *argv, **options) as process:
        yield process


class Listener:
    """A Unix socket that takes one descriptor of each connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(4)
        self._socket.settimeout(PATIENCE)

    def receive(self) -> tuple[bytes, int]:
        connection, _ = self._socket.accept()
        with connection:
            connection.settimeout(PATIENCE)
            data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
            while more := connection.recv(1 << 16):
                data += more
        assert len(fds) == 1
        return data, fds[0]

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def listener(path: Path) -> Iterator[Listener]:
    found = Listener(path)
    try:
        yield found
    finally:
        found.close()


class Screen:
    """The master of a terminal: what has come from it so far."""

    def __init__(self, master: int) -> None:
        self.master = master
        self.text = ""

    def until(self, words: str) -> str:
        """Read until `words` have come; all that has come."""
        deadline = time.monotonic() + PATIENCE
        while words not in self.text:
            assert select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))[0], self.text
            try:
                data = os.read(self.master, 4096)
            except OSError:
                data = b""
            assert data, f"ended without {words!r}: {self.text!r}"
            self.text += data.decode()
        return self.text

    def write(self, text: str) -> None:
        os.write(self.master, text.encode())


@contextlib.contextmanager
def seat(argv: list[str], rows: int = 30, columns: int = 100, **options: Any) -> Iterator[tuple[Screen, Any]]:
    """A command with a terminal of the test's as its controlling one."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def become_session() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with running(*argv, stdin=slave, stdout=slave, stderr=slave, preexec_fn=become_session, **options) as process:
        try:
            yield Screen(master), process
        finally:
            os.close(master)
            os.close(slave)
