"""Run another program in a container (`exec`): the starter's side; init/exec.py is the other side.

A detached program becomes a child of the container's init, as if that had started it, and writes to the container's
log. So CRIU finds it, and it moves with the container. This does not apply if the caller takes care of the program (an
engine, which asks for a pid file or has the terminal), if pymigrate's monitor does not watch the container, or if the
container uses the pids of another one.
"""

from __future__ import annotations

import os
import time

from runtime import sync
from runtime.errors import Conflict, StartFailed
from runtime.lifecycle import engine_sockets
from runtime.lifecycle import run as foreground
from runtime.light import signals
from runtime.light.records import Record
from runtime.limits import HANDSHAKE_TIMEOUT
from runtime.linux import capabilities, processes, selfexec
from runtime.state.record import State
from runtime.state.status import Status

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from runtime.spec.config import Spec
    from runtime.spec.process import Process
    from runtime.state.store import Store

_WHO = "the exec'ed process"
_STEP = 0.05  # seconds


class Options(Record):
    """The flags of `exec`, beside the program. `cgroups` are the values of --cgroup: [CONTROLLER,...:]PATH."""

    detach: bool = False
    pid_file: str | None = None
    console_socket: str | None = None
    pidfd_socket: str | None = None
    preserve_fds: int = 0
    ignore_paused: bool = False
    cgroups: tuple[str, ...] = ()


def run(store: Store, container_id: str, choose: Callable[[State], tuple[Process, Spec]], options: Options) -> int:
    """Run another program, which `choose` names with the container's spec, with the caller's standard streams.

    Returns its exit status, or 0 when detached. With `ignore_paused` it waits while the container is paused. Signals to
    this process are forwarded to the program. The lock is held until there is a process in the container, because a
    container that is being moved must not get a process that would stay behind. From then on the container could delay
    this process, which must not delay others by the lock.
    """
    if options.detach:
        _fill_standard_streams()
    while True:
        while options.ignore_paused and store.load(container_id).status is Status.PAUSED:
            # Without the lock, which `resume` needs. A cgroup version 1 freezer has no event to wait for.
            time.sleep(_STEP)
        with store.lock(container_id):
            state = store.load(container_id)
            status = state.status
            if status is not Status.PAUSED:
                status.require(container_id, "exec")
                child, pid, handshake, ours, spec = _prepare(state, choose, options)
                break
            if not options.ignore_paused:
                raise Conflict(
                    f"cannot exec in a paused container ({container_id})", remedy="use --ignore-paused, or resume it"
                )
    try:
        if options.detach:
            _finish(handshake, state, spec, pid, options)
            _wait(child)
            return 0
        with foreground.Forwarding(pid):  # before the program runs: Ctrl-C may answer its first words
            _finish(handshake, state, spec, pid, options)
            if ours is not None:
                return foreground.with_terminal(ours, lambda: None, lambda: _wait(child))
            return _wait(child)
    except BaseException as error:
        _end(child, pid)
        _refuse_ended(state, error)
        raise


def _prepare(
    state: State, choose: Callable[[State], tuple[Process, Spec]], options: Options
) -> tuple[int, int, socket.socket, socket.socket | None, Spec]:
    """Return what `_begin` does, this side's end of the connection for the terminal's master, and the spec."""
    process, spec = choose(state)
    capabilities.warn(process.capabilities, remapped="user" in spec.namespaces)
    ours = theirs = None
    if process.terminal:
        if options.console_socket is not None:
            theirs = engine_sockets.connect_console(options.console_socket)
        elif options.detach:
            raise Conflict("cannot allocate tty if pymigrate will detach without setting console socket")
        else:
            ours, theirs = sync.pair()
            # It has the size of this terminal from the beginning; later changes are copied (terminal.copy_size).
            process = process.replace(console_size=process.console_size or terminal_size())
    resident = options.detach and theirs is None and options.pid_file is None
    resident = resident and bool(state.monitor_pid) and spec.is_new("pid")
    return *_begin(state, process, spec, options, theirs, resident=resident), ours, spec


def _refuse_ended(state: State, error: BaseException) -> None:
    """Raise Conflict if the container's exit caused a failure: `kill` does not wait for the lock."""
    if isinstance(error, StartFailed) and not processes.runs(state.pid, state.pid_start_time):
        Status.STOPPED.require(state.id, "exec")


def terminal_size() -> tuple[int, int] | None:
    """Return the rows and columns of this process's terminal, None without one."""
    try:
        size = os.get_terminal_size(0)
    except OSError:
        return None
    return size.lines, size.columns


def _begin(
    state: State, process: Process, spec: Spec, options: Options, console: socket.socket | None, *, resident: bool
) -> tuple[int, int, socket.socket]:
    """Start the process that stays outside, and through it the process that becomes the program.

    Returns their pids and this side's end of the handshake. Raises StartFailed.
    """
    ours, theirs = sync.pair()
    streams = [_log_stream(state, number) for number in (1, 2)] if resident else []
    keep = [theirs.fileno(), *range(3, 3 + options.preserve_fds), *(fd for fd in streams if fd >= 0)]
    if console is not None:
        keep.append(console.fileno())
    filter = engine_sockets.compile_filter(spec)
    config: dict[str, Any] = {
        "id": state.id, "pid": state.pid, "start_time": state.pid_start_time,
        "process": process.plain(), "detach": options.detach,
        "cgroups": _below(state.cgroup_paths, options.cgroups), "keep": options.preserve_fds,
        "resident": resident, "streams": streams,
        "personality": spec.personality,
        "console": None if console is None else console.fileno(),
        "filter": filter and {**filter.plain(), "program": filter.program.hex()},
    }  # fmt: skip
    sync.ask_for_pids(ours)
    child = selfexec.spawn_sealed(selfexec.command("runtime.init.exec", str(theirs.fileno())), keep)
    theirs.close()
    for fd in streams:
        if fd >= 0:
            os.close(fd)
    if console is not None:
        console.close()
    try:
        sync.tell(ours, {"config": config})
        return child, sync.receive_pid(ours, HANDSHAKE_TIMEOUT, _WHO), ours
    except BaseException as error:
        ours.close()
        _end(child, 0)
        _refuse_ended(state, error)
        raise


def _fill_standard_streams() -> None:
    """Open those that the caller has closed: no other descriptor may get the number of one of the program's streams."""
    while (fd := os.open("/dev/null", os.O_RDWR)) < 3:
        os.set_inheritable(fd, True)
    os.close(fd)


def _log_stream(state: State, number: int) -> int:
    """Open the pipe that is the container's stdout or stderr; -1 if its monitor no longer reads from it."""
    table = f"/proc/{state.monitor_pid}/fd"
    try:
        names = os.listdir(table) if state.stdio[number].startswith("pipe:") else []
    except OSError:
        return -1  # it has exited
    for name in names:
        try:
            if os.readlink(f"{table}/{name}") == state.stdio[number]:
                return os.open(f"{table}/{name}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue  # closed since, for example because an attached client has left
    return -1


def _finish(ours: socket.socket, state: State, spec: Spec, pid: int, options: Options) -> None:
    """Complete the handshake, until the program runs. Raises StartFailed."""
    try:
        if options.pidfd_socket is not None:
            engine_sockets.send_pidfd(options.pidfd_socket, pid)
        if options.pid_file is not None:
            engine_sockets.write_pid(options.pid_file, pid)
        sync.tell(ours, {})
        engine_sockets.await_ready(ours, spec, pid, state.oci(), _WHO)
        sync.await_end(ours, HANDSHAKE_TIMEOUT, _WHO)
    finally:
        ours.close()


def _end(child: int, pid: int) -> None:
    """Kill the program, if there is one, and the process outside, which is a child of this process."""
    for number in (pid, child):
        if number:
            try:
                os.kill(number, signals.SIGKILL)
            except ProcessLookupError:
                continue
    _wait(child)


def _below(paths: dict[str, str], wanted: tuple[str, ...]) -> dict[str, str]:
    """Return the container's cgroups, or, for all or some controllers, the existing `wanted` ones below them."""
    found = dict(paths)
    for text in wanted:
        names, colon, place = text.rpartition(":")
        for controller in names.split(",") if colon else paths:
            if controller not in paths:
                raise Conflict(f"--cgroup {text}: the container has no cgroup of a controller {controller!r}")
            directory = os.path.realpath(os.path.join(paths[controller], place.strip("/")))
            if not f"{directory}/".startswith(paths[controller] + "/") or not os.path.isdir(directory):
                raise Conflict(f"--cgroup {text}: there is no such cgroup below the container's")
            for other in paths:  # controllers of one hierarchy go together
                if paths[other] == paths[controller]:
                    found[other] = directory
    return found


def _wait(child: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code
