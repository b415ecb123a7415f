"""The verb `restore`, compatible with runc's: make a running container from CRIU's images."""

from __future__ import annotations

import os

from criu_rpc.client import Criu
from runtime import sync
from runtime.checkpoint import options as criu_options
from runtime.checkpoint import supplement
from runtime.checkpoint.restore import Restoring
from runtime.checkpoint.restore_criu import RestorePlan
from runtime.init import mounts
from runtime.lifecycle import delete, engine_sockets, provision
from runtime.lifecycle import run as foreground
from runtime.light.records import Record
from runtime.limits import DUMP_TIMEOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runtime.state.store import Store


class Request(Record):
    """The flags of `restore`."""

    images: str
    work: str
    detach: bool = False
    pid_file: str | None = None
    console_socket: str | None = None
    systemd: bool = False
    net: str | None = None
    options: dict[str, Any] = {}


def restore(store: Store, container_id: str, bundle: str, request: Request) -> int:
    """Make a running container from images; return its exit status, or 0 when detached.

    Raises ContainerError, CriuError; a failure leaves nothing.
    """
    spec = provision.load_asked(os.path.abspath(bundle), request.net, request.pid_file)
    criu_options.warn_of_config(spec)
    os.makedirs(request.work, 0o700, exist_ok=True)
    with store.lock(container_id):
        plan = RestorePlan(
            id=container_id,
            bundle=os.path.abspath(bundle),
            images=request.images,
            work=request.work,
            stdio=criu_options.read_descriptors(request.images),
            carried={"resources": supplement.resources(request.images)},
            options=request.options,
            adoptable=request.pid_file is not None,
            foreground=not request.detach,
            systemd=request.systemd,
        )
        mounts.make_points(spec, os.path.realpath(spec.root))
        restoring = Restoring.prepare(store, spec, plan, Criu())
        masters: list[int] = []
        try:
            ours = request.console_socket is None and request.detach  # the monitor's
            pid = restoring.restore(DUMP_TIMEOUT, None if ours else masters.append)
            # Once it runs it cannot be undone, so every step that can fail comes before.
            if request.console_socket is not None and masters:
                sync.send_fd(request.console_socket, masters.pop(), b"/dev/ptmx")
            if request.pid_file is not None:
                engine_sockets.write_pid(request.pid_file, pid)
            state = restoring.resume()
        except BaseException:
            restoring.abort()
            raise
    if request.detach:
        return 0
    try:
        with foreground.Forwarding(state.pid):
            if masters:
                return foreground.show(masters.pop(), lambda: None, lambda: foreground.wait(state.pid))
            return foreground.wait(state.pid)
    finally:
        foreground.hold_signals()
        delete.delete(store, container_id, force=True, created=state.created)
