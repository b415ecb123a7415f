"""The child side of `exec`: join a container's cgroup and namespaces, fork into its pid namespace, execute.

The first process stays outside, waits for the program and exits with its status; a `resident` program is left to the
container's init instead. This runs under `python3 -I -S`, from an interpreter that the container cannot write to
(selfexec.sealed).
"""

from __future__ import annotations

import os
import sys

from runtime import sync
from runtime.cgroups.cgroup import Cgroup
from runtime.errors import Conflict
from runtime.init import container as container_init
from runtime.init import program as container_program
from runtime.light import signals
from runtime.limits import INIT_STEP_TIMEOUT
from runtime.linux import namespaces, processes, selfexec, syscalls
from runtime.linux.own_proc import OwnProc
from runtime.spec.process import Process, Rlimit, Scheduler

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any


def _process(value: dict[str, Any]) -> Process:
    """Return the record from its JSON form, which was validated where it was read."""
    changed: dict[str, Any] = {name: tuple(item) for name, item in value.items() if isinstance(item, list)}
    changed["rlimits"] = tuple(Rlimit(**limit) for limit in value["rlimits"])
    if value["scheduler"] is not None:
        changed["scheduler"] = Scheduler(**value["scheduler"])
    if value["capabilities"] is not None:
        changed["capabilities"] = {name: frozenset(names) for name, names in value["capabilities"].items()}
    return Process(**{**value, **changed})


def _join(pid: int, start_time: int, wanted: Process) -> bool:
    """Join the namespaces of the container's init. Return True if that entered a different user namespace.

    Raises Conflict if the init has exited.
    """
    pidfd = os.pidfd_open(pid)
    if processes.start_time(pid) != start_time:
        raise Conflict("container not running")
    flags = 0
    for kind, name in namespaces.FILES.items():
        # Also the time namespace, which CRIU makes at a restore so that the monotonic clock continues.
        if os.stat(f"/proc/{pid}/ns/{name}").st_ino != os.stat(f"/proc/self/ns/{name}").st_ino:
            flags |= namespaces.FLAGS[kind]
    remapped = bool(flags & syscalls.CLONE_NEWUSER)
    if remapped:
        container_program.schedule_self(wanted, forks=True)  # not permitted from inside the user namespace
    syscalls.setns(pidfd, flags)
    os.close(pidfd)
    if remapped:
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    return remapped


def main(argv: list[str]) -> int:
    """Run `exec`'s child side. argv: the number of the handshake's descriptor."""
    sock = sync.adopt(int(argv[0]))
    try:
        config = sync.receive(sock, INIT_STEP_TIMEOUT, "exec")["config"]
        wanted = _process(config["process"])
        given = set() if config["console"] is None else {config["console"]}
        streams = [fd for fd in config["streams"] if fd >= 0]
        container_init.close_all_but({sock.fileno(), *given, *streams}, config["keep"])
        if given:
            from runtime.init import console
        load = None
        if config["filter"]:
            value = {**config["filter"], "program": bytes.fromhex(config["filter"]["program"])}
            load = container_program.loader(container_program.Filter(**value), sock)
        syscalls.join_session_keyring(f"_ses.{config['id']}")  # the caller's keyring may hold secrets
        container_program.use_processors("initial", wanted.initial_cpus)
        Cgroup(config["cgroups"]).add(0, near=config["pid"])
        container_program.use_processors("final", wanted.final_cpus)
        container_program.tune_self(wanted)
        container_program.raise_limits(wanted)
        # The container's processes must not reach this process, or through it the host, before it has become one of
        # them. From here on no module may be loaded, because it could come from the container's files.
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
        selfexec.forbid_imports()
        own = OwnProc()
        remapped = _join(config["pid"], config["start_time"], wanted)
        pid = os.fork()
        if pid:
            own.close()
            return _wait(pid, sock, config)
        if config["resident"]:
            _reparent()
        sync.send(sock, {})  # the starter reads this process's pid off it
        sync.receive(sock, INIT_STEP_TIMEOUT, "exec")
        # A new session, so that the program cannot control the caller's terminal if that is on 0 to 2.
        os.setsid()
        if given:
            owner = sync.adopt(config["console"])
            console.open_terminal(wanted, owner, console=False)
            owner.close()
        else:
            if config["resident"]:
                _use(config["streams"])
            for fd in (0, 1, 2):
                container_program.own_null(fd)
                if not config["resident"]:  # other processes use a resident program's streams too
                    container_program.own_stream(fd, wanted.uid)
        container_program.label_next_exec(wanted, own)
        container_program.join_groups(wanted, own)
        own.close()
        container_program.enter_cwd(wanted)
        container_program.reset_signals()
        container_program.limit_self(wanted)
        if not remapped:
            container_program.schedule_self(wanted)
        if config["personality"] is not None:
            syscalls.personality(config["personality"])
        program = container_program.become_user(wanted, load)
        sync.send(sock, {"ready": True})
        container_program.execute(wanted, program)
    except BaseException as error:
        container_init.report(error, sock, "exec")
    os._exit(1)


def _reparent() -> None:
    """Fork and exit in the parent, so that the child is a child of the pid namespace's init."""
    parent = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == parent:
        os.sched_yield()


def _use(streams: list[int]) -> None:
    """Make stdin /dev/null, and stdout and stderr the two `streams`; -1 stands for /dev/null."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for number, fd in enumerate((null, *(fd if fd >= 0 else null for fd in streams))):
        os.set_blocking(fd, True)
        os.dup2(fd, number)
    for fd in {null, *streams} - {-1}:
        os.close(fd)


def _wait(pid: int, sock: socket.socket, config: dict[str, Any]) -> int:
    """Wait for the program in the process that stays outside, and exit with its status."""
    sock.close()
    if config["resident"]:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    if config["detach"]:
        os._exit(0)
    for number in (signals.SIGINT, signals.SIGQUIT, signals.SIGHUP, signals.SIGTERM):
        signals.signal(number, signals.SIG_IGN)  # `exec` forwards them to the program
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main(sys.argv[1:])
