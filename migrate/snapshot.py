"""Snapshots: a container frozen to a directory, kept, and restored from as often as wanted.

    DIR/manifest.json   what it is: container, host, CRIU, architecture, files with sizes and SHA-256
    DIR/config.json     the bundle's configuration as it was
    DIR/images/         CRIU's images (0600: they hold the container's memory)
    DIR/log             what the container had written

The root file system is not in it: it must lie unchanged where it was (its fingerprint is checked), or at --rootfs.
A snapshot is written beside its place and renamed into it, so a directory with a manifest is whole.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from criu_rpc.client import Criu
from criu_rpc.errors import CriuError
from migrate import procscan, watches
from migrate.errors import SnapshotError
from migrate.files import fingerprint
from migrate.interrupts import uninterruptible
from migrate.sockets import survey
from migrate.space import is_full, no_space
from migrate.validate import require_movable, wait_settled
from runtime import checkpoint, gate, logs, netlock, supplement, syscalls, undump
from runtime.dump import Dump
from runtime.restoring import RestorePlan, Restoring
from runtime.spec import Spec, load_kept
from runtime.spec import load as load_spec
from runtime.state import State, Store

FORMAT = 1
LOCK_TIMEOUT = 5.0
RESTORE_TIMEOUT = 120.0
LOG_TIMEOUT = 2.0
PATIENCE = 2.0  # for what passes by itself, such as a connection that is about to be accepted


@dataclass(frozen=True)
class Manifest:
    """What a snapshot is. `images` maps file names to [size in bytes, SHA-256]."""

    format: int
    id: str
    host: str
    created: str
    container_created: str
    criu: str
    machine: str
    kernel: str
    bundle: str
    rootfs: str
    fingerprint: str
    stdio: list[str]
    annotations: dict[str, str]
    images: dict[str, list[Any]]
    connections: list[str] = dataclasses.field(default_factory=list)  # with others, as "tcp LOCAL -> REMOTE"

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return sum(int(size) for size, _ in self.images.values())

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read DIR/manifest.json. Raises SnapshotError naming the field that is wrong."""
        path = directory / "manifest.json"
        try:
            fields = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise SnapshotNotFound(f"{directory} is no snapshot: it has no manifest.json") from None
        except (OSError, ValueError) as error:
            raise SnapshotError(f"{path}: cannot be read: {error}") from None
        wanted = {field.name: field.type for field in dataclasses.fields(cls)}
        if isinstance(fields, dict):
            fields.setdefault("connections", [])  # snapshots of older versions do not say
        if not isinstance(fields, dict) or set(fields) != set(wanted):
            odd = sorted(set(fields) ^ set(wanted)) if isinstance(fields, dict) else []
            raise SnapshotError(f"{path}: is not a snapshot's manifest{': ' + ', '.join(odd) if odd else ''}"[:300])
        if fields["format"] != FORMAT:
            raise SnapshotError(f"{path}: format {fields['format']!r} is not known to this version")
        for name, value in fields.items():
            base = {"format": int, "stdio": list, "annotations": dict, "images": dict, "connections": list}.get(
                name, str
            )
            if not isinstance(value, base):
                raise SnapshotError(f"{path}: {name}: must be of type {base.__name__}")
        for name, entry in fields["images"].items():
            if "/" in name or name.startswith(".") or not isinstance(entry, list) or len(entry) != 2:
                raise SnapshotError(f"{path}: images: {name!r} is malformed")
        return cls(**fields)


class SnapshotNotFound(SnapshotError):
    kind = "not-found"


def save(store: Store, container_id: str, directory: Path, *, allow: frozenset[str], stop: bool = False) -> Manifest:
    """Snapshot a running container into `directory`, which must not exist yet; it goes on, or ends with `stop`.

    Raises Blocked, SnapshotError, NoSpace, CriuError; whatever fails, the container runs on and nothing is left behind.
    """
    directory = directory.absolute()
    if directory.exists():
        raise SnapshotError(f"{directory} exists already", remedy="name another directory, or remove that one")
    if not directory.parent.is_dir():
        raise SnapshotError(f"{directory.parent} is no directory")
    with store.lock(container_id, LOCK_TIMEOUT):
        state = store.load(container_id)
        undump.mend_left(state)
        spec = load_kept(state)
        require_movable(store, state, spec, allow, PATIENCE)
        watched = watches.names(state.pid)
        with _temporary(directory, state.pid) as place:
            _write(place / "config.json", json.dumps(spec.config, indent=4).encode())
            with gate.closed(state, spec):
                wait_settled(state, allow, PATIENCE)
                skip = "tcp-backlog" in allow
                options = {"leave_running": not stop, "tcp_skip_in_flight": skip, "irmap_scan_paths": watched}
                with _dump(state, spec, place, options) as dump:
                    # While it is frozen: what it writes later belongs to the container, not to the snapshot.
                    checkpoint.wait_output_logged(state, LOG_TIMEOUT)
                    _copy_log(state, place / "log")
                    connections = sorted(str(entry) for entry in survey(state.pid).connections if not entry.inside)
                    manifest = _seal(state, place, directory, connections) if stop else None  # before it ends
                    with uninterruptible():
                        _finish(dump, directory, stop)
            manifest = manifest or _seal(state, place, directory, connections)
        if stop:
            netlock.ended(spec, state.id)
        return manifest


def _finish(dump: Dump, directory: Path, stop: bool) -> None:
    """Let the container go on, or end it. Raises CriuError; a snapshot that it may have outlived is removed then."""
    if not stop:
        dump.finish()
        return
    try:
        dump.require_frozen()
    except CriuError:
        shutil.rmtree(directory)
        raise
    dump.kill()


@contextmanager
def _dump(state: State, spec: Spec, place: Path, more: dict[str, Any]) -> Iterator[Dump]:
    """A dump into `place`/images, held with the container frozen; it thaws unless the dump is finished."""
    (place / "images").mkdir(mode=0o700)
    images = os.open(place / "images", os.O_RDONLY | os.O_DIRECTORY)
    work = syscalls.detached_tmpfs(mode=0o700)  # for CRIU's log, which must not fail with the disk
    try:
        options = checkpoint.dump_options(state, spec, images_dir_fd=images, work_dir_fd=work, **more)
        with Dump(state, spec, options, timeout=RESTORE_TIMEOUT) as dump:
            dump.run_until("post-dump")
            dump.complete(images)
            yield dump
    finally:
        os.close(images)
        os.close(work)


def _seal(state: State, place: Path, directory: Path, connections: list[str]) -> Manifest:
    """Make a whole snapshot of what lies in `place`: manifest, everything on disk, and the name it is to have."""
    manifest = _describe(state, place, connections)
    _write(place / "manifest.json", json.dumps(dataclasses.asdict(manifest), indent=2).encode() + b"\n")
    _sync_tree(place)
    place.rename(directory)
    return manifest


def _describe(state: State, place: Path, connections: list[str]) -> Manifest:
    images = {}
    for path in sorted((place / "images").iterdir()):
        path.chmod(0o600)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            images[path.name] = [file.tell(), digest]
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
        images=images,
    )


def restore(
    store: Store,
    directory: Path,
    *,
    new_id: str | None = None,
    rootfs: Path | None = None,
    net: str | None = None,
    connections: str | None = None,
) -> State:
    """Make a running container of a snapshot; the snapshot stays as it is. `net` is what --net says (network.py).

    What becomes of its TCP connections with others, if it has any, must be said: `connections` is "close" (it finds
    them closed) or "keep" (they go on, which their peers must not have noticed yet).

    Raises SnapshotError (damaged, other machine, other root file system), ContainerError (id in use), CriuError;
    on failure nothing of the new container is left.
    """
    directory = directory.absolute()
    manifest = Manifest.load(directory)
    if manifest.machine != platform.machine():
        raise SnapshotError(f"{directory}: was made on {manifest.machine}; this machine is {platform.machine()}")
    verify(directory, manifest)
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
            images=str(directory / "images"),
            work=str(work),
            stdio=tuple(manifest.stdio),
            carried={"resources": supplement.resources(directory / "images")},
            move=None,
            options={"tcp_close": True} if connections == "close" else {},
        )
        restoring = Restoring.prepare(store, spec, plan, Criu())
        try:
            if (directory / "log").exists():
                shutil.copyfile(directory / "log", restoring.history_path)
            restoring.restore(RESTORE_TIMEOUT)
            return restoring.resume()
        except BaseException:
            restoring.abort()
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def verify(directory: Path, manifest: Manifest) -> None:
    """Compare every image with the manifest. Raises SnapshotError naming the first file that differs."""
    for name, (size, digest) in manifest.images.items():
        path = directory / "images" / name
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                length = file.tell()
        except OSError as error:
            raise SnapshotError(f"{path}: {error.strerror}") from None
        if (length, found) != (size, digest):
            raise SnapshotError(f"{path}: is damaged ({length} bytes; SHA-256 {found[:12]}..., not {digest[:12]}...)")


def _runtime_dir() -> Path:
    path = Path("/run/pymigrate")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _copy_log(state: State, destination: Path) -> None:
    with destination.open("wb") as out:
        destination.chmod(0o600)
        for path in logs.parts(state.log_path):
            out.write(path.read_bytes())


@contextmanager
def _temporary(directory: Path, pid: int) -> Iterator[Path]:
    """A private directory beside `directory`, gone unless it was renamed. Raises NoSpace for a disk that fills up.

    The memory of the container whose init is `pid` is to go there.
    """
    needed = procscan.memory_bytes(pid)
    place: Path | None = None
    try:
        place = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        yield place
    except (CriuError, OSError) as error:
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
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
