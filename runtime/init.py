"""The child side of `create`: from a process of the host to the container's init, which waits for `start`.

Two stages: the first joins the cgroup and makes the namespaces, the second is the first process of the new pid
namespace. The first ends at once; the monitor, a subreaper, becomes the second's parent. sync.py draws the handshake.
Runs under `python3 -I -S`.
"""

import os
import select
import socket
import sys
from pathlib import Path
from typing import Any

from runtime import hooks, mounts, namespaces, process, sync
from runtime.cgroups import Cgroup
from runtime.spec import Spec, load

_STEP_TIMEOUT = 120.0


def _close_all_but(keep: set[int]) -> None:
    """Nothing of the caller may reach the container."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                continue  # the descriptor that listed the directory
    for fd in keep:
        os.set_inheritable(fd, False)


def _stage_one(config: dict[str, Any], spec: Spec, sock: socket.socket) -> int:
    """In the host's namespaces; returns in the child, which is pid 1 of the container."""
    # Joined before the cgroup namespace is made: its root is then the container's own cgroup.
    Cgroup(config["cgroups"]).add(0)
    namespaces.enter(spec)
    pid = os.fork()
    if pid:
        sync.send(sock, {"pid": pid})
        os._exit(0)
    return pid


def _stage_two(config: dict[str, Any], spec: Spec, sock: socket.socket) -> None:
    os.setsid()
    sync.receive(sock, _STEP_TIMEOUT, "create")
    # Before pivot_root: the reading end of the fifo that `start` writes to lies on the host.
    fifo = os.open(config["fifo"], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    process.limit_self(spec.process)
    namespaces.set_up(spec)
    mounts.build(spec)
    state = dict(config["state"], status="creating", pid=1)
    hooks.run("createContainer", spec.hooks["createContainer"], state)
    mounts.pivot(spec)
    mounts.protect(spec)
    _connect_stdio(config["stdout"], config["stderr"])
    process.enter_cwd(spec.process)
    program = process.find_program(spec.process)
    sync.send(sock, {"ready": True})
    _await_start(fifo)
    hooks.run("startContainer", spec.hooks["startContainer"], dict(state, status="created", bundle="/"))
    process.become_user(spec.process)
    process.execute(spec.process, program)


def _connect_stdio(stdout: int, stderr: int) -> None:
    """stdin is the container's own /dev/null: one of the host's could not be dumped."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd, number in ((null, 0), (stdout, 1), (stderr, 2)):
        os.dup2(fd, number)
    os.close(null)


def _await_start(fifo: int) -> None:
    """Wait for the byte that `start` writes; a writer that only opens and closes is not it."""
    poll = select.poll()
    poll.register(fifo, select.POLLIN)
    while True:
        poll.poll()
        if os.read(fifo, 1):
            os.close(fifo)
            return
        # Every writer is gone: the fifo stays readable with nothing in it until another one comes.
        os.set_blocking(fifo, True)


def main(argv: list[str]) -> int:
    """argv: the number of the handshake's descriptor."""
    sock = socket.socket(fileno=int(argv[0]))
    try:
        config = sync.receive(sock, _STEP_TIMEOUT, "create")["config"]
        _close_all_but({0, 1, 2, sock.fileno(), config["stdout"], config["stderr"]})
        spec = load(Path(config["bundle"]))
        _stage_one(config, spec, sock)
        _stage_two(config, spec, sock)
    except BaseException as error:
        # Whatever it is, the other side shows it: this process has nowhere to show it.
        text = str(error) if hasattr(error, "kind") or isinstance(error, OSError) else f"init: {error!r}"
        try:
            sync.send(sock, {"error": text})
        except OSError:
            print(text, file=sys.stderr)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
