"""Restore a snapshot."""

import os
import platform
import shutil
import tempfile
from pathlib import Path

from criu_rpc.client import Criu
from migrate.errors import SnapshotError
from migrate.files.fingerprint import fingerprint
from migrate.limits import RESTORE_TIMEOUT
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


def restore(
    store: Store,
    directory: Path,
    *,
    new_id: str | None = None,
    rootfs: Path | None = None,
    net: str | None = None,
    connections: str | None = None,
) -> State:
    """Restore a running container from a snapshot, which is not changed. `net`: the value of --net (spec/network.py).

    If it has TCP connections with other hosts, `connections` must be "close" (the program sees them closed) or "keep"
    (they continue, which works only if the peers still have them).

    Raises SnapshotError (damaged, other machine, other root file system), ContainerError (id in use), CriuError;
    after a failure nothing of the new container is left.
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
