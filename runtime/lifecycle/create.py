"""Make a container from a bundle, up to the point where its init waits for `start`."""

from __future__ import annotations

import os

from runtime import sync
from runtime.errors import ContainerError, DeadlineExceeded, SpecError, StartFailed
from runtime.init import container as container_init
from runtime.init import hooks
from runtime.lifecycle import engine_sockets
from runtime.lifecycle.provision import Provision, connect_network, limit_reached, load_asked
from runtime.light import signals
from runtime.light.records import Record
from runtime.limits import HANDSHAKE_TIMEOUT
from runtime.linux import capabilities, processes, syscalls
from runtime.linux.descriptors import Owned
from runtime.monitor import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Self

    from runtime.spec.config import Spec
    from runtime.state.record import State
    from runtime.state.store import Store


class Options(Record):
    """The flags of `create` and `run`: how a container is created, beside its bundle.

    `foreground` is for a caller that stays: the container gets the caller's standard streams, and is its child. A
    `monitored` container always gets pymigrate's monitor, which also owns its terminal without a `console_socket`;
    otherwise a caller that is ready to adopt it, and asks for a `pid_file`, is its monitor. `net` is the value of --net
    (spec/network.py). Of the `preserve_fds` the first `listen_fds` are sockets that the program learns of as systemd's
    services do (sd_listen_fds(3)).
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
    """Make a container from a bundle; its init waits for `start`.

    `connect` makes the connection that takes the master of its terminal, if it gets one and there is no
    --console-socket. Must be called by a process without threads. Raises SpecError, Conflict, StartFailed; a failure
    leaves nothing.
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
        made = Provision(store, spec, container_id, bundle)
        try:
            made.set_up(systemd=options.systemd)
            with _Launch(made, options) as launch:
                launch.start(connect)
                launch.meet()
                launch.set_up()
                launch.hand_over()
            return made.state
        except BaseException as error:
            cause = limit_reached(made.cgroup, spec.resources)
            made.disconnect()
            made.remove(run_hooks=True)
            if cause is not None and isinstance(error, StartFailed | DeadlineExceeded):
                raise type(error)(f"{cause}: {error}") from None
            raise


def _check(spec: Spec, options: Options, has_console: bool) -> None:
    """Raise the errors that need nothing to be made first."""
    if not os.path.isdir(spec.root):
        raise StartFailed(f"root.path: {spec.root} is not a directory")
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


class _Launch:
    """The steps from a container's cgroup to an init that waits for `start`: each method is one, in this order.

    Use it in a `with`: leaving that closes this process's descriptors, and after an error kills init and monitor.
    """

    def __init__(self, made: Provision, options: Options) -> None:
        self._made, self._spec, self._options = made, made.spec, options
        self._ours = Owned()
        self._handshake: socket.socket | None = None
        self._master: socket.socket | None = None  # receives the master of a terminal that the monitor owns
        self._monitor: spawn.Monitor | None = None  # None in the foreground
        self._first_stage = 0  # in the foreground, a child of this process
        self._pid = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            if self._pid:
                _kill(self._pid)
            if self._monitor is not None and self._monitor.pid:
                self._monitor.abandon()
        self._ours.close()

    def start(self, connect: Callable[[], socket.socket] | None) -> None:
        """Start the init's first stage: as a child of the monitor, or of this process in the foreground."""
        state, options = self._made.state, self._options
        with Owned() as theirs:
            fifo, errors = _make_fifos(state.directory, theirs)
            handshake, init_end = sync.pair()
            self._handshake = self._ours.socket(handshake)
            theirs.socket(init_end)
            sync.ask_for_pids(handshake)
            setup = container_init.Setup(
                spec=self._spec,
                cgroups=state.cgroup_paths,
                fifo=fifo,
                state=state.oci("creating"),
                stdio=(0, 1, 2),
                errors=errors,
                keep=options.preserve_fds,
                console=self._console(connect, theirs),
                filter=engine_sockets.compile_filter(self._spec),
                keyring=None if options.no_new_keyring else f"_ses.{state.id}",
                move_root=options.no_pivot,
            )
            if options.foreground:
                syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
                self._first_stage = processes.fork()
                if self._first_stage == 0:
                    container_init.become(setup, init_end)
                self._made.add_monitor(0, _own_streams())
            else:
                self._start_monitored(setup, init_end, theirs)

    def _start_monitored(self, setup: container_init.Setup, init_end: socket.socket, theirs: Owned) -> None:
        """Start the monitor, and the first stage as its child; or only that, for a caller that is the monitor."""
        (out_r, out_w), (err_r, err_w) = theirs.pipe(), theirs.pipe()
        piped = setup.replace(stdio=(None, out_w, err_w))
        self._monitor = spawn.spawn(
            self._made.state.directory,
            lambda own: container_init.become(setup if own else piped, init_end),
            cgroup=self._made.cgroup, stdout=out_r, stderr=err_r, fresh=False,
            adoptable=self._options.pid_file is not None and not self._options.monitored,
        )  # fmt: skip
        stdio = ("/dev/null", _stream(out_w), _stream(err_w)) if self._monitor.pid else _own_streams()
        self._made.add_monitor(self._monitor.pid, stdio if self._master is None else ("", "", ""))

    def _console(self, connect: Callable[[], socket.socket] | None, theirs: Owned) -> int | None:
        """Return the init's end of the connection that takes its terminal's master, None without a terminal."""
        if self._options.console_socket is not None:
            end = engine_sockets.connect_console(self._options.console_socket)
        elif not self._spec.process.terminal:
            return None
        elif connect is not None:
            end = connect()
        else:
            ours, end = sync.pair()
            self._master = self._ours.socket(ours)
        return theirs.socket(end).fileno()

    def meet(self) -> None:
        """Receive the init's pid, and save it."""
        assert self._handshake is not None
        self._pid = _receive_pid(self._handshake, self._spec)
        if self._first_stage:
            os.waitpid(self._first_stage, 0)
        self._made.add_init(self._pid)

    def set_up(self) -> None:
        """Connect the network, run the hooks of the host, and wait until the init has set itself up."""
        assert self._handshake is not None
        made = self._made
        if self._spec.network is not None:
            connect_network(made.state, self._spec.network, again=not self._options.foreground)
        for point in ("prestart", "createRuntime"):
            hooks.run(point, self._spec.hooks[point], made.state.oci("creating"))
        sync.tell(self._handshake, {})
        shown = made.state.oci("creating")
        engine_sockets.await_ready(self._handshake, self._spec, self._pid, shown, "the container's init")

    def hand_over(self) -> None:
        """Give the init to its monitor, and tell the caller its pid."""
        if self._monitor is not None:
            if self._master is not None:
                master = engine_sockets.receive_master(self._master)
                self._monitor.give_terminal(master)
                os.close(master)
            self._monitor.watch(self._pid)
        if self._options.pidfd_socket is not None:
            engine_sockets.send_pidfd(self._options.pidfd_socket, self._pid)
        if self._options.pid_file is not None:
            engine_sockets.write_pid(self._options.pid_file, self._pid)


def _make_fifos(directory: str, owner: Owned) -> tuple[str, int]:
    """Make the fifos of `start`: the path of the one that init waits on, the descriptor of that for its errors."""
    fifo, errors = directory + "/exec.fifo", directory + "/error.fifo"
    try:
        for path in (fifo, errors):
            os.mkfifo(path, 0o600)
        return fifo, owner.fd(os.open(errors, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise ContainerError(f"{directory}: cannot be written to: {error.strerror}") from None


def _receive_pid(ours: socket.socket, spec: Spec) -> int:
    """Receive the init's pid; before that, write the id maps of a new user namespace."""
    if spec.is_new("user"):
        from runtime.init import idmaps

        message = sync.receive(ours, HANDSHAKE_TIMEOUT, "the container's init")
        idmaps.write(int(message["map"]), spec.uid_mappings, spec.gid_mappings)
        sync.tell(ours, {})
    return sync.receive_pid(ours, HANDSHAKE_TIMEOUT, "the container's init")


def _own_streams() -> tuple[str, str, str]:
    return _stream(0), _stream(1), _stream(2)


def _stream(fd: int) -> str:
    """Return what /proc shows of a descriptor of this process, "" if it is closed."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signals.SIGKILL)
    except ProcessLookupError:
        pass  # it has exited
