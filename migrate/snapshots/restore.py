"""Restore a snapshot.

The container runs before its memory is in place, if that is possible and worth it: `_Memory` decides. The page handler
then reads the pages from the snapshot, and verifies each block before the program gets any of it.
"""

import contextlib
import os
import platform
import shutil
import tempfile
from pathlib import Path

from criu_rpc.client import Criu
from migrate.errors import DeadlineExceeded, SnapshotError, TargetError
from migrate.files.fingerprint import fingerprint
from migrate.limits import RESTORE_TIMEOUT
from migrate.memory import image_source, lazy_support
from migrate.memory.handler import PageHandler
from migrate.paths import RUN
from migrate.snapshots.manifest import IMAGES, Snapshot
from runtime import notices
from runtime.checkpoint import supplement
from runtime.checkpoint.restore import Restoring
from runtime.checkpoint.restore_criu import RestorePlan
from runtime.linux import trusted
from runtime.spec.config import Spec
from runtime.spec.config import load as load_spec
from runtime.state import lazy
from runtime.state.record import State
from runtime.state.store import Store

_LEAST = 32 << 20  # bytes of memory; with fewer it is faster to put them in place first


def restore(
    store: Store,
    directory: Path,
    *,
    new_id: str | None = None,
    rootfs: Path | None = None,
    net: str | None = None,
    connections: str | None = None,
    eager: bool = False,
) -> State:
    """Restore a running container from a snapshot, which is not changed. `net`: the value of --net (spec/network.py).

    With `eager` all memory is in place when the container runs. If it has TCP connections with other hosts,
    `connections` must be "close" (the program sees them closed) or "keep" (they continue, which works only if the peers
    still have them).

    Raises SnapshotError (damaged, other machine, other root file system), ContainerError (id in use), CriuError;
    after a failure nothing of the new container is left.
    """
    with Snapshot.open(directory) as snapshot:
        if snapshot.manifest.machine != platform.machine():
            made = f"was made on {snapshot.manifest.machine}; this machine is {platform.machine()}"
            raise SnapshotError(f"{snapshot.path}: {made}")
        snapshot.verify(pages=False)
        for warning in snapshot.warnings:
            notices.warn(f"{snapshot.path}: {warning}")
        spec = load_spec(snapshot.path, snapshot.manifest.annotations, net=net)
        digests = _verify_pages(snapshot, spec, eager=eager)
        return _restore(store, snapshot, spec, new_id, rootfs, connections, digests)


def _verify_pages(snapshot: Snapshot, spec: Spec, *, eager: bool) -> bytes | None:
    """Verify the pages that CRIU reads. Return the digests of all blocks if the page handler is to read the others.

    Raises SnapshotError.
    """
    if not snapshot.has_blocks:
        return None  # they are verified already
    reason = "" if eager else _eager_reason(snapshot, spec)
    some: dict[str, set[int]] = {}
    with snapshot.listed(IMAGES) as (images, _):
        spaces = image_source.read(images)
        is_lazy = not (eager or reason) and image_source.lazy_bytes(spaces) >= _LEAST
        if is_lazy:
            some = image_source.eager_blocks(spaces)
    if reason and image_source.lazy_bytes(spaces) >= _LEAST:
        notices.warn(f"{snapshot.path}: the container runs when all its memory is in place: {reason}")
    digests = snapshot.verify_pages(some)
    return digests.all() if is_lazy else None


def _eager_reason(snapshot: Snapshot, spec: Spec) -> str:
    """Return why all memory has to be in place before the container runs, "" if it has not."""
    if "user" in spec.namespaces and not lazy_support.is_for_everybody():
        return "it has a user namespace, and vm.unprivileged_userfaultfd is 0"
    return snapshot.manifest.eager or lazy_support.problem()


def _restore(
    store: Store,
    snapshot: Snapshot,
    spec: Spec,
    new_id: str | None,
    rootfs: Path | None,
    connections: str | None,
    digests: bytes | None,
) -> State:
    directory, manifest = snapshot.path, snapshot.manifest
    if manifest.connections and connections is None:
        shown = ", ".join(manifest.connections[:4]) + (", ..." if len(manifest.connections) > 4 else "")
        raise SnapshotError(
            f"{directory}: the container had connections that may have continued or ended since: {shown}",
            remedy="--tcp-close to have it see them closed; --tcp-established if `snapshot save --stop` made it",
        )
    root = (rootfs or Path(manifest.rootfs)).absolute()
    if not root.is_dir():
        raise SnapshotError(
            f"{directory}: the root file system {root} does not exist", remedy="name its path with --rootfs"
        )
    if fingerprint(root) != manifest.fingerprint:
        raise SnapshotError(
            f"{directory}: the root file system {root} has changed since the snapshot was made",
            remedy="restore the old one, or name a copy of it with --rootfs (made by rsync -aHAX)",
        )
    work = Path(tempfile.mkdtemp(prefix="restore-", dir=_runtime_dir()))
    try:
        plan = RestorePlan(
            id=new_id or manifest.id,
            bundle=str(directory),
            rootfs=str(root),
            images=str(directory / IMAGES),
            work=str(work),
            stdio=tuple(manifest.stdio),
            carried={"resources": supplement.resources(directory / IMAGES)},
            move=None,
            options={"tcp_close": True} if connections == "close" else {},
        )
        restoring = Restoring.prepare(store, spec, plan, Criu())
        try:
            snapshot.copy_log(Path(restoring.history_path))
            if digests is not None:
                return _resume_lazily(restoring, directory / IMAGES, work, digests)
            restoring.restore(RESTORE_TIMEOUT)
            return restoring.resume()
        except BaseException:
            restoring.abort()
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _resume_lazily(restoring: Restoring, images: Path, work: Path, digests: bytes) -> State:
    """Restore and resume the container; the page handler fills its memory. `digests` are those of all blocks."""
    note = Path(restoring.memory_note)
    handler = PageHandler.start(images, note, work, digests)
    try:
        handler.load()
        # Meanwhile the page handler starts. CRIU's connection to it waits, and so does a process that misses memory.
        restoring.restore(RESTORE_TIMEOUT, lazy_pages=True)
        handler.await_ready()
        handler.place(restoring.cgroup)
        handler.await_loaded()
        state = restoring.resume()
    except BaseException as error:
        found = lazy.read(str(note))
        handler.leave()
        restoring.abort()
        with contextlib.suppress(DeadlineExceeded):  # the error is the other one
            handler.await_end()
        if found is not None and found.failure:
            raise SnapshotError(found.failure) from None
        if isinstance(error, TargetError):
            raise SnapshotError(f"{images}: {error}") from None
        raise
    handler.resumed()
    handler.leave()
    return state


def _runtime_dir() -> Path:
    os.close(trusted.make_directory(str(RUN)))
    return RUN
