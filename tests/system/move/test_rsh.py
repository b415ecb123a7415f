"""rsync's remote shell: a relay that neither stalls nor ends because one of its ways is full."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import MigrateError
from migrate.files.rsync import send_tree
from runtime.linux import processes, selfexec
from tests.system.move.test_files import Here, ShellChannel

SIZE = 4 << 20  # more than the buffers of both sockets hold


@contextlib.contextmanager
def relay() -> Iterator[tuple[socket.socket, socket.socket, socket.socket]]:
    """It runs: what rsync writes to, what rsync reads from, and the other side of the connection."""
    far, theirs = socket.socketpair()
    into, stdin = socket.socketpair()
    stdout, out = socket.socketpair()
    out.setblocking(False)  # as rsync leaves it
    argv = selfexec.command("migrate.files.rsh", str(theirs.fileno()), "target", "rsync", "--server")
    process = subprocess.Popen(argv, stdin=stdin, stdout=out, pass_fds=[theirs.fileno()])
    theirs.close()
    try:
        for sock in (far, into, stdout):
            sock.settimeout(10.0)
        assert far.recv(1000) == b'["rsync", "--server"]\n'
        out.setblocking(False)  # rsync may set it again at any time
        stdin.setblocking(False)
        yield into, stdout, far
        far.shutdown(socket.SHUT_WR)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        for sock in (far, into, stdin, stdout, out):
            sock.close()


def receive(sock: socket.socket, size: int) -> int:
    got = 0
    while got < size and (data := sock.recv(1 << 16)):
        got += len(data)
    return got


def test_a_full_way_does_not_hold_up_the_other() -> None:
    """rsync writes names and reads requests at once: each waits until it can do the other."""
    with relay() as (into, stdout, far):
        for full, drain, way, end in ((far, stdout, into, far), (into, far, far, stdout)):
            flood = threading.Thread(target=full.sendall, args=(b"x" * SIZE,), daemon=True)
            flood.start()  # and nobody takes it
            way.sendall(b"y" * 1000)
            assert receive(end, 1000) == 1000
            assert receive(drain, SIZE) == SIZE
            flood.join(10)
            assert not flood.is_alive()


class Killing(ShellChannel):
    """Kills rsync's remote shell when it has not read what came from the target."""

    shell = 0

    def recv(self, size: int) -> bytes:
        if not self.shell:
            data = super().recv(size)
            self.shell = _shell(self.process.pid)
            os.kill(self.shell, signal.SIGSTOP)
            return data
        os.kill(self.shell, signal.SIGKILL)
        return super().recv(size)

    def exit_status(self, timeout: float = 30) -> int | None:  # type: ignore[override]
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None


def _shell(server: int) -> int:
    (rsync,) = (
        pid
        for pid in processes.children(os.getpid(), processes.start_time(os.getpid())) - {server}
        if Path(f"/proc/{pid}/comm").read_text() == "rsync\n"
    )
    (shell,) = processes.children(rsync, processes.start_time(rsync))
    return shell


def test_a_remote_shell_that_dies_is_named_at_once(tmp_path: Path) -> None:
    """Not the network: this end of the connection was reset, while the target waits for more."""
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    (tmp_path / "from" / "file").write_bytes(os.urandom(1 << 20))
    started = time.monotonic()
    with pytest.raises(MigrateError, match=r"rsync's remote shell for .* was killed"):
        send_tree(
            Here(Killing), tmp_path / "from", str(tmp_path / "to"), on_progress=lambda _: None, deadline=started + 8
        )
    assert time.monotonic() - started < 2.5
