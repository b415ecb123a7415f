"""The child side of `create`: from a fork of the runtime to the container's init, which waits for `start`.

Two stages: the first joins the cgroup and makes the namespaces; the second is the first process of the new pid
namespace. The first exits at once. The second then becomes a child of the nearest subreaper: the container's monitor,
or the caller of `create`. sync.py draws the handshake.
"""

from __future__ import annotations

import os

from criu_rpc.errors import Error
from runtime import sync
from runtime.cgroups.cgroup import Cgroup
from runtime.init import hooks, mounts
from runtime.init import namespaces as container_namespaces
from runtime.init import program as container_program
from runtime.light.records import Record
from runtime.limits import INIT_STEP_TIMEOUT
from runtime.linux import selfexec, syscalls
from runtime.linux.own_proc import OwnProc

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any, NoReturn

    from runtime.init.program import Filter
    from runtime.spec.config import Spec


class Setup(Record):
    """Everything that the init needs to set up the container.

    `cgroups` maps controllers to directories (Cgroup.paths); `fifo` is the path that `start` writes to; `stdio` the
    descriptors that become 0, 1 and 2, None for the container's own /dev/null; `errors` a descriptor for error messages
    after `start`; `keep` the number of descriptors from 3 on that the program inherits; `console` the descriptor of a
    connection that takes the terminal's master; `keyring` the name of a new session keyring.
    """

    spec: Spec
    cgroups: dict[str, str]
    fifo: str
    state: dict[str, Any]
    stdio: tuple[int | None, int | None, int | None]
    errors: int
    keep: int = 0
    console: int | None = None
    filter: Filter | None = None
    keyring: str | None = None
    move_root: bool = False


def become(setup: Setup, sock: socket.socket, *, sealed: bool = False) -> NoReturn:
    """Become the container's init; never return. The caller has forked this process for it."""
    try:
        container_program.reset_signals()
        close_all_but({sock.fileno(), *_given(setup)}, setup.keep)
        if not sealed and not selfexec.is_sealed():
            _become_sealed(setup, sock)
        _stage_two(setup, sock, *_stage_one(setup, sock))
    except BaseException as error:
        report(error, sock, "init")
    os._exit(1)


def explain(error: BaseException, program: str) -> str:
    """Return an error as text for the other side of the handshake; `program` names this side."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join([program, *([str(error.filename)] if error.filename else []), error.strerror])
    return str(error) if isinstance(error, Error | OSError) else f"{program}: {error!r}"


def report(error: BaseException, sock: socket.socket, program: str) -> None:
    """Send an error to the other side, which shows it, because this process has nowhere to show it."""
    text = explain(error, program)
    try:
        sync.send(sock, {"error": text})
    except OSError:
        return  # the other side has failed itself and says why, or was killed


def close_all_but(keep: set[int], given: int) -> None:
    """Close the caller's descriptors except 0 to 2, `keep`, and `given` descriptors from 3 on for the program."""
    program = range(3, 3 + given)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if fd > 2 and fd not in keep and fd not in program:
                os.close(fd)
            elif fd > 2:
                os.set_inheritable(fd, fd in program)
        except OSError:
            continue  # the descriptor that listed the directory


def _given(setup: Setup) -> list[int]:
    return [fd for fd in (setup.errors, setup.console, *setup.stdio) if fd is not None]


def _become_sealed(setup: Setup, sock: socket.socket) -> NoReturn:
    """Execute an interpreter that a container cannot write to (selfexec.sealed), which continues in this process."""
    import pickle

    memory = os.memfd_create("setup")
    with open(memory, "wb", closefd=False) as file:
        pickle.dump(setup, file)
    for fd in (memory, sock.fileno(), *_given(setup)):
        os.set_inheritable(fd, True)
    selfexec.execute(selfexec.command("runtime.init.container", str(memory), str(sock.fileno())))


def main(argv: list[str]) -> int:
    """Continue after `_become_sealed`. argv: the descriptors of the pickled Setup and of the handshake."""
    import pickle

    with open(int(argv[0]), "rb") as file:
        file.seek(0)
        setup = pickle.load(file)  # written by this same process in _become_sealed
    become(setup, sync.adopt(int(argv[1])), sealed=True)


def _stage_one(setup: Setup, sock: socket.socket) -> tuple[dict[int, int], frozenset[str], int]:
    """Prepare in the host's namespaces, then fork; return in the child, which is pid 1 of the container.

    Return the trees from mounts.prepare, the namespaces that may be set up (namespaces.enter), and `start`'s fifo.
    """
    spec = setup.spec
    # `start` writes to this fifo. It is opened now because a user namespace's root cannot reach it on the host, and for
    # writing too so that reading never returns end of file.
    fifo = os.open(setup.fifo, os.O_RDWR | os.O_CLOEXEC)

    def map_ids() -> None:
        sync.send(sock, {"map": os.getpid()})
        sync.receive(sock, INIT_STEP_TIMEOUT, "create")
        # This process's user is unknown in the new namespace; the namespace's root does the rest.
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)

    cgroup = Cgroup(setup.cgroups)
    born = -1
    if "user" in spec.namespaces or spec.namespaces.get("cgroup") is not None:
        cgroup.add(0)  # not permitted from inside the namespace
    else:
        born = cgroup.enter_but_unified()
    container_program.tune_self(spec.process)
    container_program.raise_limits(spec.process)
    if "user" in spec.namespaces:
        container_program.schedule_self(spec.process, forks=True)  # not permitted from inside the namespace
    if setup.keyring is not None:
        syscalls.join_session_keyring(setup.keyring)
    trees = mounts.prepare(spec)
    # A process that is in one of these namespaces already must not trace this one, nor reach the host through its /proc
    # entries. In a user namespace this process could not use those entries itself, so there this waits for the mounts.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, int("user" in spec.namespaces))
    separate = container_namespaces.enter(spec, map_ids, leave_out="cgroup" if born >= 0 else "")
    pid = _fork(cgroup, born)
    if pid:
        os._exit(0)
    if born >= 0:
        os.close(born)
        # Only after the cgroup is joined, so that the namespace's root is the container's own cgroup.
        if spec.is_new("cgroup"):
            syscalls.unshare(syscalls.CLONE_NEWCGROUP)
    # This process sends it, not its parent: if the parent were killed first, this process would wait forever.
    sync.send(sock, {})
    return trees, separate, fifo


def _fork(cgroup: Cgroup, born: int) -> int:
    """Fork, with the child in the version 2 directory `born` unless that is -1."""
    if born >= 0:
        try:
            return syscalls.fork_into(born)
        except OSError:
            cgroup.add(0)  # the kernel cannot (before 5.7); or this call raises what is wrong with the directory
    return os.fork()


def _stage_two(setup: Setup, sock: socket.socket, trees: dict[int, int], separate: frozenset[str], fifo: int) -> None:
    """Set up the container as its pid 1, wait for `start`, and execute the program."""
    spec = setup.spec
    os.setsid()
    sync.receive(sock, INIT_STEP_TIMEOUT, "create")
    container_namespaces.set_up(spec, separate)
    before = os.umask(0o022)
    root = mounts.build(spec, trees, setup.cgroups)
    os.umask(before)  # for process.become_user
    state = dict(setup.state, status="creating", pid=os.getpid())
    hooks.run("createContainer", spec.hooks["createContainer"], state)
    if spec.hooks["startContainer"]:
        hooks.preload()
    if setup.console is not None:
        from runtime.init import console
    if setup.move_root:
        from runtime.init import no_pivot  # noqa: F401 (mounts.pivot needs it where nothing can be imported)
    load_filter = container_program.loader(setup.filter, sock) if setup.filter is not None else None
    selfexec.forbid_imports()
    own = OwnProc()
    mounts.protect(spec, root)
    mounts.pivot(spec, move=setup.move_root)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    if setup.console is not None:
        owner = sync.adopt(setup.console)
        console.open_terminal(spec.process, owner, console=True)
        owner.close()
    else:
        _connect_stdio(setup)
    container_program.label_next_exec(spec.process, own)
    container_program.join_groups(spec.process, own)
    own.close()
    container_program.enter_cwd(spec.process)
    container_program.limit_self(spec.process)
    if "user" not in spec.namespaces:
        container_program.schedule_self(spec.process)
    if spec.personality is not None:
        syscalls.personality(spec.personality)
    program = container_program.become_user(spec.process, load_filter)
    sync.send(sock, {"ready": True})
    _await_start(fifo)
    try:
        hooks.run("startContainer", spec.hooks["startContainer"], dict(state, status="created"), cwd="/")
        container_program.execute(spec.process, program)
    except BaseException as error:
        os.write(setup.errors, explain(error, "init").encode())  # `start` reads it; the socket's other end is closed
    os._exit(1)


def _connect_stdio(setup: Setup) -> None:
    for number, fd in enumerate(setup.stdio):
        if fd is None:
            # Opened inside, because CRIU could not dump the host's.
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, number)
            os.close(null)
        elif fd != number:
            os.dup2(fd, number)
        else:
            os.set_inheritable(fd, True)
        container_program.own_null(number)
        container_program.own_stream(number, setup.spec.process.uid)


def _await_start(fifo: int) -> None:
    """Wait for the byte that `start` writes."""
    os.read(fifo, 1)
    os.close(fifo)
