"""Save a snapshot: a directory with a frozen container, which can be restored any number of times.

    DIR/manifest.json   container, host, CRIU, architecture, all files with sizes and SHA-256 (manifest.py)
    DIR/digests         of the blocks of the images that hold pages (page_digests.py)
    DIR/config.json     the bundle's configuration at that time
    DIR/images/         CRIU's images (0600, because they hold the container's memory)
    DIR/log             the container's output so far

The root file system is not in it: it must be unchanged at its path (its fingerprint is checked), or at --rootfs. A
snapshot is written to a neighbour directory, which is renamed once all of it is on disk, so a directory with a manifest
is complete.
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
from migrate.limits import CONTAINER_LOCK_TIMEOUT, LOG_TIMEOUT, PASSING_PATIENCE, RESTORE_TIMEOUT
from migrate.memory import lazy_support
from migrate.memory.image_source import is_pages
from migrate.preflight import landlock, watches
from migrate.preflight import processes as process_scan
from migrate.preflight.container import require_movable, wait_settled
from migrate.preflight.sockets import survey
from migrate.snapshots import page_digests
from migrate.snapshots.manifest import CONFIG, FORMAT, IMAGES, LOG, MANIFEST, Manifest, entry, refusal
from migrate.snapshots.page_digests import PageDigests
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


def save(store: Store, container_id: str, directory: Path, *, allow: frozenset[str], stop: bool = False) -> Manifest:
    """Save a running container to `directory`, which must not exist; then resume it, or with `stop` kill it.

    Raises Blocked, SnapshotError, NoSpace, CriuError; after a failure the container runs, and no files are left behind.
    """
    directory = directory.absolute()
    if directory.exists():
        raise SnapshotError(f"{directory} exists already", remedy="name another directory, or remove that one")
    directory = Path(os.path.realpath(directory.parent), directory.name)
    try:
        os.close(trusted.open_directory(str(directory.parent), sticky=True))
    except OSError as error:
        raise refusal(directory.parent, error, "save it in a directory to which no other user can write") from None
    with store.lock(container_id, CONTAINER_LOCK_TIMEOUT):
        state = store.load(container_id)
        mend.repair_left(state)
        spec = load_kept(state)
        require_movable(state, spec, allow, PASSING_PATIENCE)
        if words := landlock.warning(state.id, landlock.suspects(state.pid, spec)):
            notices.warn(words)
        watched = watches.names(state.pid)
        eager = lazy_support.shared_by_fork(state.pid)
        with _temporary(directory, state.pid) as place:
            _write(place / CONFIG, json.dumps(spec.config, indent=4).encode())
            with syn_gate.closed(state, spec):
                wait_settled(state, allow, PASSING_PATIENCE)
                skip = "tcp-backlog" in allow
                options = {"leave_running": not stop, "tcp_skip_in_flight": skip, "irmap_scan_paths": watched}
                with _dump(state, spec, place, options) as dump:
                    # While the container is frozen, because its later output does not belong to the snapshot.
                    logs.wait_output_logged(state, LOG_TIMEOUT)
                    copy_log(state, place / LOG)
                    connections = sorted(str(entry) for entry in survey(state.pid).connections if not entry.inside)
                    # Before it is killed.
                    manifest = _seal(state, place, directory, connections, eager) if stop else None
                    with uninterruptible():
                        _finish(dump, directory, stop)
            manifest = manifest or _seal(state, place, directory, connections, eager)
        if stop:
            network_lock.ended(spec, state.id)
        return manifest


def _finish(dump: Dump, directory: Path, stop: bool) -> None:
    """Resume the container, or kill it. Raises CriuError; remove a snapshot that the container may have outlived."""
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
    """Dump into `place`/images; yield the dump, with the container frozen. Roll back unless it is finished."""
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


def _seal(state: State, place: Path, directory: Path, connections: list[str], eager: str) -> Manifest:
    """Complete the snapshot in `place`: write the manifest, wait for the disk, and rename it to `directory`."""
    digests = PageDigests({})
    manifest = _describe(state, place, connections, digests, eager).sealed()
    _write(place / page_digests.NAME, digests.all())
    _write(place / MANIFEST, manifest.to_bytes())
    _sync_tree(place)
    place.rename(directory)
    try:
        sync(directory.parent)
    except OSError:
        shutil.rmtree(directory)
        raise
    return manifest


def _describe(state: State, place: Path, connections: list[str], digests: PageDigests, eager: str) -> Manifest:
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
        images={path.name: _entry(path, digests) for path in sorted((place / IMAGES).iterdir())},
        files={name: _entry(place / name) for name in (CONFIG, LOG)},
        eager=eager,
    )


def _entry(path: Path, digests: PageDigests | None = None) -> list[Any]:
    """Return the entry of a file; with `digests`, those of the blocks of a pages image are added to them."""
    path.chmod(0o600)
    if digests is not None and is_pages(path.name):
        return digests.add(path.name, path)
    with path.open("rb") as file:
        return entry(file)


def copy_log(state: State, destination: Path) -> None:
    with destination.open("wb") as out:
        destination.chmod(0o600)
        for path in logs.parts(state.log_path):
            out.write(path.read_bytes())


@contextmanager
def _temporary(directory: Path, pid: int) -> Iterator[Path]:
    """Make a private directory beside `directory`; remove it unless it was renamed. Raises NoSpace if the disk is full.

    `pid`: the init of the container whose memory goes there.
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
    """Wait until everything below `place` is on disk, so that the rename cannot reach it before the contents."""
    for path in (*place.rglob("*"), place):
        sync(path)
