"""Snapshots: a container frozen to a directory, kept, and restored from as often as wanted.

    DIR/manifest.json   what it is: container, host, CRIU, architecture, all files with sizes and SHA-256 (manifest.py)
    DIR/config.json     the bundle's configuration as it was
    DIR/images/         CRIU's images (0600: they hold the container's memory)
    DIR/log             what the container had written

The root file system is not in it: it must lie unchanged where it was (its fingerprint is checked), or at --rootfs.
A snapshot is written beside its place and renamed into it once the disk has all of it, so a directory with a manifest
is whole.
"""

import json
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from criu_rpc.client import Criu
from criu_rpc.errors import CriuError, DeadlineExceeded
from migrate.disk import is_full, no_space, sync
from migrate.errors import SnapshotError
from migrate.files.fingerprint import fingerprint
from migrate.interrupts import uninterruptible
from migrate.preflight import landlock, watches
from migrate.preflight import processes as process_scan
from migrate.preflight.container import require_movable, wait_settled
from migrate.preflight.sockets import survey
from migrate.snapshots.manifest import CONFIG, FORMAT, IMAGES, LOG, MANIFEST, Manifest, entry, refusal
from migrate.snapshots.restore import RESTORE_TIMEOUT
from runtime import notices
from runtime.checkpoint import options as criu_options
from runtime.checkpoint.dump import Dump
from runtime.freeze import mend, network_lock, syn_gate
from runtime.linux import syscalls, trusted
from runtime.monitor import logs
from runtime.spec.config import Spec
from runtime.state.kept_config import load_kept
from runtime.state.record import State
from runtime.state.store import Store

LOCK_TIMEOUT = 5.0
LOG_TIMEOUT = 2.0
PATIENCE = 2.0  # for what passes by itself, such as a connection that is about to be accepted


def save(store: Store, container_id: str, directory: Path, *, allow: frozenset[str], stop: bool = False) -> Manifest:
    """Snapshot a running container into `directory`, which must not exist yet; it goes on, or ends with `stop`.

    Raises Blocked, SnapshotError, NoSpace, CriuError; whatever fails, the container runs on and nothing is left behind.
    """
    directory = directory.absolute()
    if directory.exists():
        raise SnapshotError(f"{directory} exists already", remedy="name another directory, or remove that one")
    directory = Path(os.path.realpath(directory.parent), directory.name)
    try:
        os.close(trusted.open_directory(str(directory.parent), sticky=True))
    except OSError as error:
        raise refusal(directory.parent, error, "save it where nobody else can write") from None
    with store.lock(container_id, LOCK_TIMEOUT):
        state = store.load(container_id)
        mend.repair_left(state)
        spec = load_kept(state)
        require_movable(state, spec, allow, PATIENCE)
        if words := landlock.warning(state.id, landlock.suspects(state.pid, spec)):
            notices.warn(words)
        watched = watches.names(state.pid)
        with _temporary(directory, state.pid) as place:
            _write(place / CONFIG, json.dumps(spec.config, indent=4).encode())
            with syn_gate.closed(state, spec):
                wait_settled(state, allow, PATIENCE)
                skip = "tcp-backlog" in allow
                options = {"leave_running": not stop, "tcp_skip_in_flight": skip, "irmap_scan_paths": watched}
                with _dump(state, spec, place, options) as dump:
                    # While it is frozen: what it writes later belongs to the container, not to the snapshot.
                    logs.wait_output_logged(state, LOG_TIMEOUT)
                    copy_log(state, place / LOG)
                    connections = sorted(str(entry) for entry in survey(state.pid).connections if not entry.inside)
                    manifest = _seal(state, place, directory, connections) if stop else None  # before it ends
                    with uninterruptible():
                        _finish(dump, directory, stop)
            manifest = manifest or _seal(state, place, directory, connections)
        if stop:
            network_lock.ended(spec, state.id)
        return manifest


def _finish(dump: Dump, directory: Path, stop: bool) -> None:
    """Let the container go on, or end it. Raises CriuError; a snapshot that it may have outlived is removed then."""
    if not stop:
        dump.finish()
        return
    try:
        dump.require_frozen()
    except (CriuError, DeadlineExceeded):
        shutil.rmtree(directory)
        raise
    dump.kill()


@contextmanager
def _dump(state: State, spec: Spec, place: Path, more: dict[str, Any]) -> Iterator[Dump]:
    """A dump into `place`/images, held with the container frozen; it thaws unless the dump is finished."""
    (place / IMAGES).mkdir(mode=0o700)
    images = os.open(place / IMAGES, os.O_RDONLY | os.O_DIRECTORY)
    work = syscalls.detached_tmpfs(mode=0o700)  # for CRIU's log, which must not fail with the disk
    try:
        options = criu_options.dump_options(state, spec, images_dir_fd=images, work_dir_fd=work, **more)
        with Dump(state, spec, options, timeout=RESTORE_TIMEOUT) as dump:
            dump.run_until("post-dump")
            dump.complete(images)
            yield dump
    finally:
        os.close(images)
        os.close(work)


def _seal(state: State, place: Path, directory: Path, connections: list[str]) -> Manifest:
    """Make a whole snapshot of what lies in `place`: manifest, everything on disk, and the name it is to have."""
    manifest = _describe(state, place, connections).sealed()
    _write(place / MANIFEST, manifest.to_bytes())
    _sync_tree(place)
    place.rename(directory)
    try:
        sync(directory.parent)
    except OSError:
        shutil.rmtree(directory)
        raise
    return manifest


def _describe(state: State, place: Path, connections: list[str]) -> Manifest:
    return Manifest(
        format=FORMAT,
        connections=connections,
        id=state.id,
        host=socket.gethostname(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        container_created=state.created,
        criu=str(Criu().version()),
        machine=platform.machine(),
        kernel=platform.release(),
        bundle=state.bundle,
        rootfs=state.rootfs,
        fingerprint=fingerprint(Path(state.rootfs)),
        stdio=list(state.stdio),
        annotations=dict(state.annotations),
        images={path.name: _entry(path) for path in sorted((place / IMAGES).iterdir())},
        files={name: _entry(place / name) for name in (CONFIG, LOG)},
    )


def _entry(path: Path) -> list[Any]:
    path.chmod(0o600)
    with path.open("rb") as file:
        return entry(file)


def copy_log(state: State, destination: Path) -> None:
    with destination.open("wb") as out:
        destination.chmod(0o600)
        for path in logs.parts(state.log_path):
            out.write(path.read_bytes())


@contextmanager
def _temporary(directory: Path, pid: int) -> Iterator[Path]:
    """A private directory beside `directory`, gone unless it was renamed. Raises NoSpace for a disk that fills up.

    The memory of the container whose init is `pid` is to go there.
    """
    needed = process_scan.memory_bytes(pid)
    place: Path | None = None
    try:
        place = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        yield place
    except (CriuError, DeadlineExceeded, OSError) as error:
        if not is_full(directory.parent, error):
            raise
        written = sum(path.stat().st_size for path in place.rglob("*")) if place else 0
        raise no_space(directory, needed - written) from None
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(data)


def _sync_tree(place: Path) -> None:
    """Everything below `place` to disk, so that the rename cannot come before its contents."""
    for path in (*place.rglob("*"), place):
        sync(path)
