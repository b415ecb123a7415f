"""Making a container of a bundle, up to the point where its init waits for `start`."""

from __future__ import annotations

import os

from runtime import sync
from runtime.cgroups import monitor as monitor_cgroup
from runtime.cgroups.cgroup import Cgroup
from runtime.errors import ContainerError, DeadlineExceeded, SpecError, StartFailed
from runtime.init import container as container_init
from runtime.init import hooks
from runtime.lifecycle import engine_sockets
from runtime.lifecycle.provision import (
    claim_network,
    connect_network,
    later_hooks,
    limit_reached,
    load_asked,
    make_cgroup,
    now,
    remove_cgroup,
    remove_network,
)
from runtime.light import signals
from runtime.light.records import Record
from runtime.linux import capabilities, namespaces, processes, syscalls
from runtime.monitor import spawn
from runtime.state.kept_config import keep
from runtime.state.record import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from runtime.spec.config import Spec
    from runtime.state.store import Store


class Options(Record):
    """How a container is created, beside its bundle; what the flags of `create` and `run` say.

    `foreground` is for a caller that stays: the container gets its standard streams, and is its child. A `monitored`
    one gets a monitor of ours in any case, which owns its terminal too if there is no `console_socket`; else a caller
    who is ready to adopt it, and asks for a `pid_file`, is that. `net` is what --net says (spec/network.py). Of the
    `preserve_fds` the first `listen_fds` are sockets that the program is told of as systemd tells (sd_listen_fds(3)).
    """

    pid_file: str | None = None
    console_socket: str | None = None
    pidfd_socket: str | None = None
    preserve_fds: int = 0
    listen_fds: int = 0
    no_pivot: bool = False
    no_new_keyring: bool = False
    systemd: bool = False
    net: str | None = None
    foreground: bool = False
    monitored: bool = False


def create(
    store: Store,
    container_id: str,
    bundle: str,
    options: Options = Options(),  # noqa: B008 (it is frozen)
    connect: Callable[[], socket.socket] | None = None,
) -> State:
    """Make a container of a bundle; its init waits for `start`.

    `connect` makes the connection that takes the master of its terminal, when it is to have one and there is no
    --console-socket. Raises SpecError, Conflict,
    StartFailed; after a failure nothing of it is left. Must be called by a process without threads.
    """
    bundle = os.path.abspath(bundle)
    with store.lock(container_id):
        if options.pid_file is not None:
            from runtime.state import moved_mark

            moved_mark.require_not_moved(container_id, bundle)
        spec = load_asked(bundle, options.net, options.pid_file)
        if options.listen_fds:
            told = (f"LISTEN_FDS={options.listen_fds}", "LISTEN_PID=1")
            spec = spec.replace(process=spec.process.replace(env=(*spec.process.env, *told)))
        _check(spec, options, connect is not None)
        if spec.network is not None:
            from runtime.spec import config as spec_config

            spec = spec_config.with_mac(spec)
        directory = store.create(container_id)
        state = State(
            id=container_id,
            bundle=bundle,
            rootfs=os.path.realpath(spec.root),
            created=now(),
            log_path=directory + "/log",
            annotations=spec.annotations,
            hooks=later_hooks(spec),
        )
        if spec.network is not None:
            claim_network(store, state, spec.network)
        cgroup = Cgroup({})
        try:
            keep(spec, directory)
            state, cgroup = make_cgroup(store, state, spec, systemd=options.systemd)
            return _launch(store, state, spec, cgroup, options, connect)
        except BaseException as error:
            cause = limit_reached(cgroup, spec.resources)
            remove_cgroup(cgroup)
            remove_network(state)
            # As after any other end (runtime.md, lifecycle, steps 3 to 13).
            hooks.run_all("poststop", spec.hooks["poststop"], state.oci("stopped"))
            store.remove(container_id)
            if cause is not None and isinstance(error, StartFailed | DeadlineExceeded):
                raise type(error)(f"{cause}: {error}") from None
            raise


def _check(spec: Spec, options: Options, has_console: bool) -> None:
    """What can be said before anything is made."""
    if not os.path.isdir(spec.root):
        raise StartFailed(f"root.path: {spec.root} is no directory")
    if spec.process.terminal and options.console_socket is None and not (has_console or options.monitored):
        raise SpecError(
            "cannot allocate tty if pymigrate will detach without setting console socket",
            remedy="set process.terminal to false, give --console-socket, or use `run` (`run --detach` and `attach`)",
        )
    if options.console_socket is not None and not spec.process.terminal:
        raise SpecError("cannot use console socket if pymigrate will not detach or allocate tty: terminal is false")
    capabilities.warn(spec.process.capabilities, remapped="user" in spec.namespaces)
    if spec.process.apparmor_profile or spec.process.selinux_label or spec.mount_label:
        from runtime.init.program import require_labels

        require_labels(spec.process, spec.mount_label)


def _launch(
    store: Store,
    state: State,
    spec: Spec,
    cgroup: Cgroup,
    options: Options,
    connect: Callable[[], socket.socket] | None,
) -> State:
    """Start the init, go through the handshake, save the state as created."""
    directory = state.directory
    fifo = directory + "/exec.fifo"
    try:
        for path in (fifo, directory + "/error.fifo"):
            os.mkfifo(path, 0o600)
        errors = os.open(directory + "/error.fifo", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ContainerError(f"{directory}: cannot be written to: {error.strerror}") from None
    ours, theirs = sync.pair()
    sync.ask_for_pids(ours)
    kept: socket.socket | None = None  # takes the master of a terminal that is the monitor's
    (out_r, out_w), (err_r, err_w) = ((-1, -1),) * 2 if options.foreground else (os.pipe(), os.pipe())
    setup = container_init.Setup(
        spec=spec,
        cgroups=state.cgroup_paths,
        fifo=fifo,
        state=state.oci("creating"),
        stdio=(0, 1, 2),
        errors=errors,
        keep=options.preserve_fds,
        filter=engine_sockets.compile_filter(spec),
        keyring=None if options.no_new_keyring else f"_ses.{state.id}",
        move_root=options.no_pivot,
    )
    keeper: spawn.Monitor | None = None
    adopted: int | None = None
    pid = 0
    try:
        terminal: socket.socket | None = None
        if options.console_socket is not None:
            terminal = engine_sockets.connect_console(options.console_socket)
        elif connect is not None and spec.process.terminal:
            terminal = connect()
        elif spec.process.terminal:
            kept, terminal = sync.pair()
        if terminal is not None:
            setup = setup.replace(console=terminal.fileno())
        if options.foreground:
            syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
            adopted = processes.fork()
            if adopted == 0:
                container_init.become(setup, theirs)
            stdio = _streams(0, 1, 2)
        else:
            keeper = spawn.spawn(
                directory,
                lambda own: container_init.become(setup if own else setup.replace(stdio=(None, out_w, err_w)), theirs),
                cgroup=cgroup, stdout=out_r, stderr=err_r, fresh=False,
                adoptable=options.pid_file is not None and not options.monitored,
            )  # fmt: skip
            stdio = ("/dev/null", *_streams(out_w, err_w)) if keeper.pid else _streams(0, 1, 2)
            if kept is not None and terminal is not None:
                stdio = ("", "", "")
                terminal.close()
            if keeper.pid and cgroup.unit is not None:
                monitor_cgroup.add(cgroup, keeper.pid)
        theirs.close()
        for fd in (out_r, out_w, err_r, err_w, errors):
            if fd >= 0:
                os.close(fd)
        monitor_pid = keeper.pid if keeper is not None else 0
        state = state.replace(
            monitor_pid=monitor_pid, stdio=stdio,
            monitor_start_time=processes.start_time(monitor_pid) if monitor_pid else None,
        )  # fmt: skip
        pid = _receive_pid(ours, spec)
        cgroup.release_claim()
        if adopted:
            os.waitpid(adopted, 0)
        state = state.replace(
            pid=pid, pid_start_time=processes.start_time(pid), namespace_paths=namespaces.paths(pid)
        )  # fmt: skip
        store.save(state)
        if spec.network is not None:
            connect_network(state, spec.network, again=not options.foreground)
        for point in ("prestart", "createRuntime"):
            hooks.run(point, spec.hooks[point], state.oci("creating"))
        sync.tell(ours, {})
        engine_sockets.await_ready(ours, spec, pid, state.oci("creating"), "the container's init")
        if keeper is not None:
            if kept is not None:
                master = engine_sockets.receive_master(kept)
                keeper.give_terminal(master)
                os.close(master)
            keeper.watch(pid)
        if options.pidfd_socket is not None:
            engine_sockets.send_pidfd(options.pidfd_socket, pid)
        if options.pid_file is not None:
            engine_sockets.write_pid(options.pid_file, pid)
        return state
    except BaseException:
        if pid:
            _kill(pid)
        if keeper is not None and keeper.pid:
            keeper.abandon()
        raise
    finally:
        ours.close()
        if kept is not None:
            kept.close()


def _receive_pid(ours: socket.socket, spec: Spec) -> int:
    """The init's pid; the maps of a new user namespace are written on the way."""
    if spec.is_new("user"):
        from runtime.init import idmaps

        message = sync.receive(ours, engine_sockets.TIMEOUT, "the container's init")
        idmaps.write(int(message["map"]), spec.uid_mappings, spec.gid_mappings)
        sync.tell(ours, {})
    return sync.receive_pid(ours, engine_sockets.TIMEOUT, "the container's init")


def _streams(*fds: int) -> Any:
    """What /proc shows of our descriptors; "" for one that is closed."""
    found = []
    for fd in fds:
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            found.append("")
    return tuple(found)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signals.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended by itself
