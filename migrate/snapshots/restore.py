"""Restore a snapshot."""

import os
import platform
import shutil
import tempfile
from pathlib import Path

from criu_rpc.client import Criu
from migrate.errors import SnapshotError
from migrate.files.fingerprint import fingerprint
from migrate.paths import RUN
from migrate.snapshots.manifest import IMAGES, Snapshot
from runtime import notices
from runtime.checkpoint import supplement
from runtime.checkpoint.restore import Restoring
from runtime.checkpoint.restore_criu import RestorePlan
from runtime.linux import trusted
from runtime.spec.config import load as load_spec
from runtime.state.record import State
from runtime.state.store import Store

RESTORE_TIMEOUT = 120.0


def restore(
    store: Store,
    directory: Path,
    *,
    new_id: str | None = None,
    rootfs: Path | None = None,
    net: str | None = None,
    connections: str | None = None,
) -> State:
    """Make a running container of a snapshot; the snapshot stays as it is. `net` is what --net says (spec/network.py).

    What becomes of its TCP connections with others, if it has any, must be said: `connections` is "close" (it finds
    them closed) or "keep" (they go on, which their peers must not have noticed yet).

    Raises SnapshotError (damaged, other machine, other root file system), ContainerError (id in use), CriuError;
    on failure nothing of the new container is left.
    """
    with Snapshot.open(directory) as snapshot:
        if snapshot.manifest.machine != platform.machine():
            made = f"was made on {snapshot.manifest.machine}; this machine is {platform.machine()}"
            raise SnapshotError(f"{snapshot.path}: {made}")
        snapshot.verify()
        for warning in snapshot.warnings:
            notices.warn(f"{snapshot.path}: {warning}")
        return _restore(store, snapshot, new_id, rootfs, net, connections)


def _restore(
    store: Store, snapshot: Snapshot, new_id: str | None, rootfs: Path | None, net: str | None, connections: str | None
) -> State:
    directory, manifest = snapshot.path, snapshot.manifest
    if manifest.connections and connections is None:
        shown = ", ".join(manifest.connections[:4]) + (", ..." if len(manifest.connections) > 4 else "")
        raise SnapshotError(
            f"{directory}: it had connections that may have gone on or ended since: {shown}",
            remedy="--tcp-close: it finds them closed; --tcp-established: only if it ended with the snapshot (--stop)",
        )
    root = (rootfs or Path(manifest.rootfs)).absolute()
    if not root.is_dir():
        raise SnapshotError(f"{directory}: its root file system {root} is not here", remedy="name it with --rootfs")
    if fingerprint(root) != manifest.fingerprint:
        raise SnapshotError(
            f"{directory}: the root file system {root} is not what it was when the snapshot was made",
            remedy="bring the old one back, or name a copy of it with --rootfs (rsync -aHAX keeps what counts)",
        )
    spec = load_spec(directory, manifest.annotations, net=net)
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
            restoring.restore(RESTORE_TIMEOUT)
            return restoring.resume()
        except BaseException:
            restoring.abort()
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _runtime_dir() -> Path:
    os.close(trusted.make_directory(str(RUN)))
    return RUN
