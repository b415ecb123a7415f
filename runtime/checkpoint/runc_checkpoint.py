"""The verb `checkpoint`, compatible with runc's."""

from __future__ import annotations

import os

from runtime.cgroups.cgroup import Cgroup
from runtime.checkpoint.dump import Dump, pre_dump
from runtime.checkpoint.options import dump_options, warn_of_config, write_descriptors
from runtime.errors import ContainerError, SpecError
from runtime.freeze import mend, network_lock, unfreezable
from runtime.lifecycle import delete
from runtime.light.records import Record
from runtime.limits import DUMP_TIMEOUT
from runtime.state import lazy
from runtime.state.kept_config import load_kept
from runtime.state.status import Status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runtime.spec.config import Spec
    from runtime.state.record import State
    from runtime.state.store import Store


class Request(Record):
    """The flags of `checkpoint`."""

    images: str
    work: str
    parent: str | None = None
    pre_dump: bool = False
    leave_running: bool = False
    options: dict[str, Any] = {}


def checkpoint(store: Store, container_id: str, request: Request) -> None:
    """Write a container's images; it is gone afterwards, except with --leave-running or --pre-dump.

    Raises CriuError, ContainerError; the container keeps running then.
    """
    with store.lock(container_id):
        state = store.load(container_id)
        mend.repair_left(state)
        status = state.status
        status.require(container_id, "checkpoint")
        lazy.require_whole(state, "checkpoint")
        spec = load_kept(state)
        warn_of_config(spec)
        for directory in (request.images, request.work):
            try:
                os.makedirs(directory, 0o700, exist_ok=True)
            except OSError as error:
                raise ContainerError(f"{directory}: cannot be made: {error.strerror}") from None
        if request.parent is not None and not os.path.isdir(os.path.join(request.images, request.parent)):
            raise SpecError(f"--parent-path {request.parent}: no such directory, relative to {request.images}")
        cgroup = Cgroup.of(state)
        cgroup.require_own()
        if status is Status.PAUSED:
            cgroup.thaw()  # CRIU freezes by itself, and cannot dump a process in the freezer
        gone = False
        try:
            _dump(state, spec, request, paused=status is Status.PAUSED)
            gone = not (request.pre_dump or request.leave_running)
        finally:
            if status is Status.PAUSED and not gone:
                cgroup.freeze()
        if gone:
            delete.remove(store, state)
            network_lock.ended(spec, state.id)


def _dump(state: State, spec: Spec, request: Request, *, paused: bool) -> None:
    if not request.pre_dump:  # first, because the restore of a lazy dump begins before the dump is over
        write_descriptors(request.images, state.stdio)
    directory, work = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (request.images, request.work))
    try:
        options = dump_options(
            state, spec, images_dir_fd=directory, work_dir_fd=work, leave_running=request.leave_running,
            parent_img=request.parent, track_mem=request.pre_dump or request.parent is not None, **request.options,
        )  # fmt: skip
        unfreezable.require_none(state)
        if request.pre_dump:
            pre_dump(state, options, timeout=DUMP_TIMEOUT, paused=paused)
        else:
            from runtime.freeze import syn_gate

            with (
                syn_gate.closed(state, spec),
                Dump(state, spec, options, timeout=DUMP_TIMEOUT, paused=paused) as dump,
            ):
                dump.run_until("post-dump")
                dump.complete(directory)
                dump.finish()
    finally:
        os.close(directory)
        os.close(work)
