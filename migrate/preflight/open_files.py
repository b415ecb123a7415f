"""Check that files which a container has open or mapped, and which are not sent, are the same at the target.

CRIU opens them again by path, and rejects a file of another size or another build-id.
"""

import hashlib
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from typing import Protocol

from migrate.files import mountinfo
from migrate.wire.frames import MAX_REPLY
from migrate.wire.protocol import CheckFiles
from migrate.wire.questions import MAX_FILES, Seen
from migrate.wire.records import dumps
from migrate.wire.replies import FilesSeen
from runtime.linux import processes

_HASHED = 64 << 20  # bytes; up to this size contents decide when only the times differ
_BUILD_ID_NOTE, _PT_NOTE, _MAX_NOTES = 3, 4, 1 << 20
_LONGEST_ID = 64  # bytes


class Agent(Protocol):
    def call(self, call: CheckFiles, timeout: float = ...) -> FilesSeen: ...


def look(path: str, *, digest: bool = False) -> Seen:
    """Return what is at `path`, following links."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return Seen(path)
    with open(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return Seen(path)
        contents = hashlib.file_digest(file, "sha256").hexdigest() if digest and info.st_size <= _HASHED else ""
        return Seen(path, info.st_size, info.st_mtime_ns, build_id(fd), contents)


def build_id(fd: int) -> str:
    """Return the GNU build-id of an ELF file in hex, "" if it is not ELF or has none (elf(5))."""
    head = os.pread(fd, 64, 0)
    if len(head) < 64 or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return ""
    order, wide = "<" if head[5] == 1 else ">", head[4] == 2
    offset = struct.unpack_from(order + ("Q" if wide else "I"), head, 32 if wide else 28)[0]
    size, count = struct.unpack_from(order + "HH", head, 54 if wide else 42)
    table = os.pread(fd, min(size * count, 1 << 16), offset)
    for start in range(0, len(table) - size + 1, size or 1):
        kind = struct.unpack_from(order + "I", table, start)[0]
        if kind == _PT_NOTE and size >= (56 if wide else 32):
            at = struct.unpack_from(order + ("Q" if wide else "I"), table, start + (8 if wide else 4))[0]
            length = struct.unpack_from(order + ("Q" if wide else "I"), table, start + (32 if wide else 16))[0]
            found = _note(os.pread(fd, min(length, _MAX_NOTES), at), order)
            if found:
                return found
        if not size:
            break
    return ""


def _note(data: bytes, order: str) -> str:
    at = 0
    while at + 12 <= len(data):
        name, size, kind = struct.unpack_from(order + "III", data, at)
        start = at + 12 + (name + 3) // 4 * 4
        if kind == _BUILD_ID_NOTE and data[at + 12 : at + 16] == b"GNU\0":
            return data[start : start + min(size, _LONGEST_ID)].hex()
        at = start + (size + 3) // 4 * 4
    return ""


def in_use(init_pid: int, bound: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """Return the regular files on bind mounts that processes have open or mapped: (path here, path at the target).

    `bound`: see volumes.Plan.bound. Files on other mounts below those are left out.
    """
    places = {place: (source, there) for place, source, there in bound}
    mounts = mountinfo.read(init_pid)
    found: dict[str, str] = {}
    for path in _paths(init_pid) if places else ():
        mount = mountinfo.holding(path, mounts)
        if mount is not None and mount.place in places:
            source, there = places[mount.place]
            rest = path[len(mount.place.rstrip("/")) :]
            found[source + rest] = there + rest
    return [(here, there) for here, there in sorted(found.items()) if os.path.isfile(here)][:MAX_FILES]


def _paths(init_pid: int) -> set[str]:
    """Return the paths that are open or mapped, as the container sees them; without deleted files (in the images)."""
    found = set()
    for pid in processes.container_pids(init_pid):
        try:
            for number in os.listdir(f"/proc/{pid}/fd"):
                found.add(os.readlink(f"/proc/{pid}/fd/{number}"))
            with open(f"/proc/{pid}/maps", errors="surrogateescape") as file:
                found |= {fields[5].rstrip("\n") for line in file if len(fields := line.split(None, 5)) > 5}
        except OSError:
            continue
    return {path for path in found if path.startswith("/") and not path.endswith(" (deleted)")}


def differing(agent: Agent, files: list[tuple[str, str]], timeout: float) -> list[tuple[str, str]]:
    """Return those of the files that are not the same at the target: (path there, problem)."""
    if not files:
        return []
    before = [look(here) for here, _ in files]
    asked = [seen.replace(path=there) for seen, (_, there) in zip(before, files, strict=True)]
    answers: list[Seen] = []
    for batch in _batches(asked):
        answers += agent.call(CheckFiles(batch), timeout).files
    found = []
    for (here, there), old, answer in zip(files, before, answers, strict=True):
        problem = _difference(old, look(here), answer, here)
        if problem:
            found.append((there, problem))
    return found


def _batches(items: list[Seen]) -> Iterator[list[Seen]]:
    """Yield the items in batches whose answers fit in one reply."""
    batch: list[Seen] = []
    size = 0
    for item in items:
        more = len(dumps(item)) + 4 * _LONGEST_ID  # the answer adds a build-id and a digest
        if batch and size + more > MAX_REPLY - 1024:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += more
    if batch:
        yield batch


def _difference(before: Seen, after: Seen, there: Seen, here: str) -> str:
    """Return why CRIU would reject the file, "" if it would not; one that grows meanwhile may have any size between."""
    if there.size < 0:
        return "does not exist, and the container has it open"
    if not min(before.size, after.size) <= there.size <= max(before.size, after.size):
        return f"has {there.size} bytes, here {after.size}, and the container has it open"
    if after.build_id or there.build_id:
        return (
            "" if there.build_id == after.build_id else f"has build-id {there.build_id[:16]}, not {after.build_id[:16]}"
        )
    if there.mtime_ns in (before.mtime_ns, after.mtime_ns) or before.mtime_ns < there.mtime_ns < after.mtime_ns:
        return ""
    if there.digest and there.digest == look(here, digest=True).digest:
        return ""
    return "was changed at another time than here, and the container has it open"


def answer(call: CheckFiles) -> FilesSeen:
    """Answer CheckFiles at the target; see `differing`."""
    found = []
    for asked in call.files:
        seen = look(asked.path)
        if seen.size == asked.size and seen.mtime_ns != asked.mtime_ns and not seen.build_id:
            seen = look(asked.path, digest=True)
        found.append(seen)
    return FilesSeen(found)
