"""Parse the mounts, mount options, devices and id mappings of a config.json (runtime-spec, config.md)."""

from __future__ import annotations

import os

from runtime.errors import NotSupported
from runtime.light.records import Record
from runtime.linux.mount_flags import (
    ATTR_ATIME,
    ATTR_NOATIME,
    ATTR_NODEV,
    ATTR_NODIRATIME,
    ATTR_NOEXEC,
    ATTR_NOSUID,
    ATTR_NOSYMFOLLOW,
    ATTR_RDONLY,
    ATTR_STRICTATIME,
    MS_BIND,
    MS_DIRSYNC,
    MS_I_VERSION,
    MS_LAZYTIME,
    MS_MANDLOCK,
    MS_NOATIME,
    MS_NODEV,
    MS_NODIRATIME,
    MS_NOEXEC,
    MS_NOSUID,
    MS_NOSYMFOLLOW,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_RELATIME,
    MS_REMOUNT,
    MS_SHARED,
    MS_SILENT,
    MS_SLAVE,
    MS_STRICTATIME,
    MS_SYNCHRONOUS,
    MS_UNBINDABLE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from runtime.spec.fields import Fields


# Option -> (flag, whether the option clears it)
FLAGS: dict[str, tuple[int, bool]] = {
    "defaults": (0, False), "ro": (MS_RDONLY, False), "rw": (MS_RDONLY, True), "nosuid": (MS_NOSUID, False),
    "suid": (MS_NOSUID, True), "nodev": (MS_NODEV, False), "dev": (MS_NODEV, True), "noexec": (MS_NOEXEC, False),
    "exec": (MS_NOEXEC, True), "sync": (MS_SYNCHRONOUS, False), "async": (MS_SYNCHRONOUS, True),
    "dirsync": (MS_DIRSYNC, False), "mand": (MS_MANDLOCK, False), "nomand": (MS_MANDLOCK, True),
    "noatime": (MS_NOATIME, False), "atime": (MS_NOATIME, True), "nodiratime": (MS_NODIRATIME, False),
    "diratime": (MS_NODIRATIME, True), "relatime": (MS_RELATIME, False), "norelatime": (MS_RELATIME, True),
    "strictatime": (MS_STRICTATIME, False), "nostrictatime": (MS_STRICTATIME, True), "silent": (MS_SILENT, False),
    "loud": (MS_SILENT, True), "iversion": (MS_I_VERSION, False), "noiversion": (MS_I_VERSION, True),
    "lazytime": (MS_LAZYTIME, False), "nolazytime": (MS_LAZYTIME, True), "nosymfollow": (MS_NOSYMFOLLOW, False),
    "symfollow": (MS_NOSYMFOLLOW, True), "bind": (MS_BIND, False), "rbind": (MS_BIND | MS_REC, False),
    "remount": (MS_REMOUNT, False),
}  # fmt: skip
PROPAGATIONS = {
    "private": MS_PRIVATE, "rprivate": MS_PRIVATE | MS_REC, "slave": MS_SLAVE, "rslave": MS_SLAVE | MS_REC,
    "shared": MS_SHARED, "rshared": MS_SHARED | MS_REC, "unbindable": MS_UNBINDABLE,
    "runbindable": MS_UNBINDABLE | MS_REC,
}  # fmt: skip
# Option for a whole tree of mounts -> (attributes to set, attributes to clear). An access-time mode is a value of its
# own field, which is cleared first.
RECURSIVE: dict[str, tuple[int, int]] = {
    "rro": (ATTR_RDONLY, 0), "rrw": (0, ATTR_RDONLY), "rnosuid": (ATTR_NOSUID, 0), "rsuid": (0, ATTR_NOSUID),
    "rnodev": (ATTR_NODEV, 0), "rdev": (0, ATTR_NODEV), "rnoexec": (ATTR_NOEXEC, 0), "rexec": (0, ATTR_NOEXEC),
    "rnodiratime": (ATTR_NODIRATIME, 0), "rdiratime": (0, ATTR_NODIRATIME), "rrelatime": (0, ATTR_ATIME),
    "rnorelatime": (ATTR_STRICTATIME, ATTR_ATIME), "rnoatime": (ATTR_NOATIME, ATTR_ATIME),
    "ratime": (0, ATTR_ATIME), "rstrictatime": (ATTR_STRICTATIME, ATTR_ATIME),
    "rnostrictatime": (0, ATTR_ATIME), "rnosymfollow": (ATTR_NOSYMFOLLOW, 0), "rsymfollow": (0, ATTR_NOSYMFOLLOW),
}  # fmt: skip
OTHER = ("tmpcopyup", "idmap", "ridmap")
ID_MAX = 2**32 - 2


def plain(path: str) -> str:
    """Return an absolute path without empty and "." parts."""
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


class IdMapping(Record):
    """A mapping of `size` ids: those from `container` on are those from `host` on outside."""

    container: int
    host: int
    size: int


class Mount(Record):
    """One entry of `mounts`. `idmap` is "", "idmap" or "ridmap"; without own mappings the container's apply."""

    destination: str
    type: str
    source: str
    options: tuple[str, ...] = ()
    idmap: str = ""
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()

    @property
    def place(self) -> str:
        """The destination without empty and "." parts."""
        return plain(self.destination)

    @property
    def is_bind(self) -> bool:
        return self.type == "bind" or "bind" in self.options or "rbind" in self.options

    @property
    def recursive(self) -> bool:
        return "rbind" in self.options


class Device(Record):
    """A device node to make: `type` is c, b or p."""

    path: str
    type: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int


class Options(Record):
    """Mount options by kind: flags of mount(2), flags to clear in a bind mount, changes of propagation to make
    afterwards, attributes to set and to clear in the whole tree, and data for the file system."""

    flags: int
    cleared: int
    propagation: tuple[int, ...]
    set: int
    clear: int
    copy_up: bool
    data: str


def parse_options(options: tuple[str, ...]) -> Options:
    """Sort mount options by kind; unknown ones are data for the file system."""
    flags = cleared = attributes = unset = 0
    propagation, data, copy_up = [], [], False
    for option in options:
        if option in PROPAGATIONS:
            propagation.append(PROPAGATIONS[option])
        elif option in FLAGS:
            flag, clear = FLAGS[option]
            flags = flags & ~flag if clear else flags | flag
            cleared = cleared | flag if clear else cleared & ~flag
        elif option in RECURSIVE:
            to_set, to_clear = RECURSIVE[option]
            attributes = attributes & ~to_clear | to_set
            unset = unset & ~to_set | to_clear
        elif option in OTHER:
            copy_up = copy_up or option == "tmpcopyup"
        else:
            data.append(option)
    return Options(flags, cleared, tuple(propagation), attributes, unset, copy_up, ",".join(data))


def parse_mount(entry: Fields, bundle: str | Path) -> Mount:
    """Validate one entry of `mounts`; a bind mount's source may be relative to the bundle. Raises SpecError."""
    # A relative destination is relative to the root (runtime-spec 1.2, config.md, "Mounts").
    destination = os.path.join("/", entry.need("destination", str))
    entry.check_path("destination", destination)
    if not destination.strip("/."):
        entry.refuse("destination", "must be below the root, which a mount on it would hide")
    options = entry.strings("options")
    idmap = next((option for option in options if option in ("idmap", "ridmap")), "")
    uids, gids = parse_mappings(entry, "uidMappings"), parse_mappings(entry, "gidMappings")
    if bool(uids) != bool(gids):
        entry.refuse("uidMappings" if gids else "gidMappings", "is missing: both are needed")
    kind = entry.take("type", str, "")
    source = entry.take("source", str, "")
    mount = Mount(destination, kind, source, options, idmap or ("idmap" if uids else ""), uids, gids)
    _check_proc(entry, mount)
    if mount.is_bind and not mount.source:
        entry.refuse("source", "is missing: a bind mount needs one")
    if not kind and not mount.is_bind:
        entry.refuse("type", "is missing")
    if mount.is_bind and (unknown := parse_options(options).data):
        entry.refuse("options", f"{unknown[:100]!r} is unknown for a bind mount", NotSupported)
    if mount.idmap and not mount.is_bind:
        entry.refuse("uidMappings" if uids else "options", "ids can be mapped in a bind mount only")
    if "tmpcopyup" in options and kind != "tmpfs":
        entry.refuse("options", "tmpcopyup is for a mount of type tmpfs")
    return mount.replace(source=os.path.abspath(os.path.join(bundle, source))) if mount.is_bind else mount


# Files of /proc that may be replaced, as lxcfs does, for example.
_SHOWN = ("cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "slabinfo", "net/dev",
          "sys/kernel/ns_last_pid", "sys/crypto/fips_enabled")  # fmt: skip


def _check_proc(entry: Fields, mount: Mount) -> None:
    """Refuse mounts over /proc, because the runtime itself relies on the kernel's files there."""
    _, first, *below = mount.place.split("/")
    if first != "proc":
        return
    if not below and mount.type != "proc" and not (mount.is_bind and mount.source.rstrip("/") == "/proc"):
        entry.refuse("destination", "only a mount of type proc can be mounted on /proc")
    if below and not (mount.is_bind and "/".join(below) in _SHOWN):
        entry.refuse("destination", "cannot be a mount point: the runtime relies on the kernel's files in /proc")


def parse_mappings(parent: Fields, name: str) -> tuple[IdMapping, ...]:
    """Validate an array of id mappings. Raises SpecError."""
    found = []
    for entry in parent.objects(name):
        ids = [entry.natural(field, 0, largest=ID_MAX) or 0 for field in ("containerID", "hostID")]
        size = entry.natural("size", 0, largest=ID_MAX + 1) or 0
        if not size:
            entry.refuse("size", "must be at least 1")
        if max(ids) + size > 2**32:
            entry.refuse("size", "reaches beyond the last id")
        found.append(IdMapping(ids[0], ids[1], size))
    return tuple(found)


def parse_device(entry: Fields) -> Device:
    """Validate one entry of `linux.devices`. Raises SpecError."""
    path = entry.check_path("path", entry.need("path", str))
    kind = entry.choice("type", ("c", "b", "p", "u"))
    if not kind:
        entry.refuse("type", "is missing: must be c, b, p or u")
    if path.rstrip("/") == "":
        entry.refuse("path", "must not be the root")
    return Device(
        path=path,
        type="c" if kind == "u" else kind,
        major=entry.number("major", 0, smallest=-1, largest=2**12 - 1) or 0,
        minor=entry.number("minor", 0, smallest=-1, largest=2**20 - 1) or 0,
        # Some engines leave the file type's bits of stat(2) in it.
        mode=(entry.natural("fileMode", 0o666, largest=0o177777) or 0) & 0o7777,
        uid=entry.natural("uid", 0, largest=ID_MAX) or 0,
        gid=entry.natural("gid", 0, largest=ID_MAX) or 0,
    )
