"""Read mounts from /proc/PID/mountinfo (proc_pid_mountinfo(5)), and know which file systems several hosts share."""

import os
import re
from pathlib import Path

from runtime.light.records import Record

# File systems whose contents other hosts see too -> the common name of equivalent types.
NETWORK = {
    "nfs": "nfs", "nfs4": "nfs", "cifs": "cifs", "smb3": "cifs", "smbfs": "cifs", "ceph": "ceph", "9p": "9p",
    "virtiofs": "virtiofs", "lustre": "lustre", "gpfs": "gpfs", "ocfs2": "ocfs2", "gfs2": "gfs2", "afs": "afs",
    "beegfs": "beegfs", "orangefs": "orangefs", "pvfs2": "orangefs", "wekafs": "wekafs", "vboxsf": "vboxsf",
    "fuse.glusterfs": "glusterfs", "glusterfs": "glusterfs", "fuse.ceph": "ceph", "fuse.ceph-fuse": "ceph",
    "fuse.sshfs": "sshfs", "fuse.mfs": "moosefs", "fuse.moosefs": "moosefs", "fuse.seaweedfs": "seaweedfs",
    "fuse.juicefs": "juicefs", "fuse.s3fs": "s3fs", "fuse.rclone": "rclone", "fuse.vmhgfs-fuse": "vmhgfs",
    "fuse.gcsfuse": "gcsfuse", "fuse.goofys": "goofys", "fuse.blobfuse2": "blobfuse", "fuse.curlftpfs": "curlftpfs",
}  # fmt: skip
_ESCAPED = re.compile(r"\\([0-7]{3})")


class Mount(Record):
    """One mount. `root` is the directory of the file system that `place` shows; `source` a device or "server:/export".

    `device` is that of its files, as "major:minor"; `options` are the file system's, not the mount's. `is_private`:
    mounts propagate neither from it nor to it.
    """

    root: str
    place: str
    fstype: str
    source: str
    device: str = ""
    options: str = ""
    is_private: bool = True

    @property
    def network(self) -> str:
        """The kind of network file system, "" for a local one."""
        return NETWORK.get(self.fstype, "")

    def export(self, path: str) -> str:
        """Return the name of `path`, on this mount, that is the same on all hosts that mount the same export."""
        inner = os.path.normpath(f"{self.root.rstrip('/')}/{os.path.relpath(path, self.place)}")
        source = self.source
        if self.network == "cifs":
            source = source.replace("\\", "/").lower()
        elif self.network == "ceph" and ":/" in source:
            monitors, _, directory = source.partition(":/")
            source = f"{','.join(sorted(monitors.split(',')))}:/{directory}"
        if ":/" in source or source.startswith("//"):
            return (source.rstrip("/") + inner).rstrip("/")  # a directory of the export may be mounted
        return f"{source} {inner}"


def parse(text: str) -> list[Mount]:
    """Return the mounts of a mountinfo file, in its order: a later one covers earlier ones at the same place."""
    found = []
    for line in text.split("\n"):  # not splitlines(), because names may contain other line ends unescaped
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) >= 6 and len(kind) >= 2:
            found.append(
                Mount(
                    _plain(fields[3]), _plain(fields[4]), kind[0], _plain(kind[1]), fields[2], "".join(kind[2:3]),
                    len(fields) == 6,
                )
            )  # fmt: skip
    return found


def read(pid: int | str = "self") -> list[Mount]:
    """Return the mounts that a process sees; none if it is gone."""
    try:
        return parse(os.fsdecode(Path(f"/proc/{pid}/mountinfo").read_bytes()))
    except OSError:
        return []


def ids(pid: int) -> set[int]:
    """Return the ids of the mounts that a process sees; none if it is gone."""
    try:
        return {int(line.split()[0]) for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()}
    except OSError:
        return set()


def device(info: os.stat_result) -> str:
    """Return a file's device in the form of Mount.device."""
    return f"{os.major(info.st_dev)}:{os.minor(info.st_dev)}"


def holding(path: str, mounts: list[Mount]) -> Mount | None:
    """Return the mount that the absolute `path` is on."""
    best = None
    for mount in mounts:
        if is_below(path, mount.place) and (best is None or len(mount.place) >= len(best.place)):
            best = mount
    return best


def is_below(path: str, place: str) -> bool:
    """Return whether `path` is `place` or below it; both absolute."""
    return path == place or path.startswith(place.rstrip("/") + "/")


def _plain(text: str) -> str:
    """Replace the octal escapes of space, tab, newline and backslash."""
    if "\\" not in text:
        return text
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)
