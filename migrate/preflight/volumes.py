"""Plan how a container's bind mounts and overlays move: the source's plan, before it asks the target.

`--volume PATH=copy|shared|NEWPATH` decides for the bind mount on PATH. By default a network file system is shared;
read-only binds and single files are taken as the target has them (a small file that it lacks is sent); and a directory
of this host that the container may write to blocks the move, because only the user knows what it is. A tmpfs that an
engine has mounted and bound as a container's /dev/shm is the container's own: it goes with the images like any tmpfs.

The file at a mount's source may have been replaced since it was mounted. The file that the container sees is sent.
"""

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrate.errors import UsageError
from migrate.files import fingerprint as fingerprints
from migrate.files import mountinfo
from migrate.files.mountinfo import is_below
from migrate.files.trees import Needed, Tree, is_place
from migrate.paths import VOLUMES
from migrate.preflight.hostfacts import overlay_defaults
from migrate.preflight.rules import Blocker
from runtime.linux import syscalls
from runtime.linux.mount_flags import MS_PRIVATE, MS_RDONLY
from runtime.spec.config import Spec
from runtime.spec.mounts import Mount, parse_options
from runtime.state.record import State

SMALL = 1 << 20  # bytes; a single bound file of at most this size is sent if the target lacks it
_HOST = ("/proc", "/sys", "/dev")  # every host has its own
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True)
class Plan:
    """How the mounts move. `trees` are sent; `needed` must exist at the target; `sources` maps a bind mount to its
    source there.

    `bound`: bind mounts whose files the target has itself: (destination, source here, source there). `tmpfs`: bind
    mounts that become the container's own tmpfs at the target.
    """

    trees: tuple[Tree, ...] = ()
    needed: tuple[Needed, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()
    bound: tuple[tuple[str, str, str], ...] = ()
    problems: tuple[Blocker, ...] = ()
    tmpfs: tuple[Mount, ...] = ()

    def spec(self, spec: Spec) -> Spec:
        """Return the spec for the dump: mounts that go with the images are not external."""
        own = {mount.destination: mount for mount in self.tmpfs}
        return spec.replace(mounts=tuple(own.get(mount.destination, mount) for mount in spec.mounts))

    def config(self, value: dict[str, Any]) -> str:
        """Return config.json for the target, made from its `value` here."""
        there = dict(self.sources)
        own = {mount.destination: mount for mount in self.tmpfs}
        mounts = []
        for mount in value.get("mounts", []):
            if (tmpfs := own.get(mount.get("destination"))) is not None:
                mount = mount | {"type": tmpfs.type, "source": tmpfs.source, "options": list(tmpfs.options)}
            source = there.get(_place(str(mount.get("destination"))))
            mounts.append(mount if source is None else mount | {"source": source})
        return json.dumps(value | {"mounts": mounts} if mounts else value)

    def measured(self) -> "Plan":
        """Return the plan with the trees' sizes on disk, and the fingerprints of those that do not change."""
        trees = []
        for tree in self.trees:
            if not tree.empty:
                path = Path(tree.source)
                constant = fingerprints.fingerprint(path) if tree.fingerprint else ""
                tree = tree.replace(size=fingerprints.size(path), fingerprint=constant)
            trees.append(tree)
        return dataclasses.replace(self, trees=tuple(trees))

    def with_found(self, found: set[str]) -> "Plan":
        """Return the plan without the trees that the target has; `found` holds their names."""
        taken = {tree.name: tree.source for tree in self.trees if tree.found and tree.name in found}
        return dataclasses.replace(
            self,
            trees=tuple(tree for tree in self.trees if tree.name not in taken),
            sources=tuple((dict(self.sources) | taken).items()),
            bound=(*self.bound, *((name, source, source) for name, source in taken.items())),
        )


def parse(options: list[str]) -> dict[str, str]:
    """Parse `--volume PATH=POLICY` options into a dictionary. Raises UsageError."""
    found: dict[str, str] = {}
    for option in options:
        place, equals, policy = option.partition("=")
        if not equals or not place.startswith("/") or not (policy in ("copy", "shared") or policy.startswith("/")):
            raise UsageError(f"--volume {option}: must be PATH=copy, PATH=shared or PATH=/NEW/PATH")
        if policy.startswith("/") and (".." in policy.split("/") or not policy.isprintable()):
            raise UsageError(f"--volume {option}: {policy!r} is not a plain absolute path")
        if _place(place) in found:
            raise UsageError(f"--volume {option}: {place} is given twice")
        found[_place(place)] = policy
    return found


def _place(path: str) -> str:
    return os.path.normpath("/" + path.lstrip("/"))


UNKNOWN = "0" * 64  # stands for a fingerprint until `measured`


class _Planner:
    def __init__(self, state: State, spec: Spec, mounts: list[mountinfo.Mount]) -> None:
        self._state, self._spec, self._mounts = state, spec, mounts
        self._inside = mountinfo.read(state.pid)
        self.trees: list[Tree] = []
        self.needed: list[Needed] = []
        self.sources: dict[str, str] = {}
        self.bound: list[tuple[str, str, str]] = []
        self.problems: list[Blocker] = []
        self.tmpfs: list[Mount] = []

    def problem(self, rule: str, place: str, text: str) -> None:
        self.problems.append(Blocker(rule, f"mount {place}", text))

    def bind(self, mount: Mount, policy: str | None) -> None:
        place, source = _place(mount.destination), os.path.realpath(mount.source)
        replaced = self._replaced(place, source)
        source = replaced or source
        try:
            mode = os.stat(source).st_mode
        except OSError as error:
            self.problem(
                "missing-source", place, f"its source {mount.source} cannot be read on this host: {error.strerror}"
            )
            return
        directory = stat.S_ISDIR(mode)
        on = mountinfo.holding(source, self._mounts)
        network = self._network(place, on)
        if policy is None and self._is_own_tmpfs(mount, source, on):
            self.tmpfs.append(_as_tmpfs(mount, source))
        elif policy == "copy":
            self._copy(place, source, mode, constant=_is_readonly(mount))
        elif policy in (None, "shared") and network is not None:
            where, path = network
            export = where.export(path or source) if policy is None else ""  # with "shared" the user vouches for it
            self.sources[place] = mount.source
            self.needed.append(Needed(place, mount.source, directory, where.network, export))
        elif policy is not None:
            self._leave(place, source, mount.source if policy == "shared" else policy, directory)
        elif directory and not _is_readonly(mount) and not any(is_below(source, host) for host in _HOST):
            self.problem("volume", place, f"is {source} of this host, which the container may write to")
        elif stat.S_ISREG(mode) and os.stat(source).st_size <= SMALL and (replaced or not is_below(source, "/proc")):
            there = self.sources[place] = self._own(place, source)
            self.trees.append(Tree(place, source, there, single=True, found=not replaced))
        else:
            self._leave(place, source, mount.source, directory)

    def _network(self, place: str, on: mountinfo.Mount | None) -> tuple[mountinfo.Mount, str] | None:
        """Return the network mount that the container has at `place`, and a path on it ("": the bind's source)."""
        inside = [mount for mount in self._inside if mount.place == place]
        if inside:  # another file system may be mounted at the source by now
            return (inside[-1], place) if inside[-1].network else None
        return (on, "") if on is not None and on.network else None

    def _is_own_tmpfs(self, mount: Mount, source: str, on: mountinfo.Mount | None) -> bool:
        """Return whether the mount is a whole tmpfs on /dev/shm, of a container that does not share its memory."""
        whole = on is not None and (on.fstype, on.place, on.root) == ("tmpfs", source, "/")
        apart = all(flags & MS_PRIVATE for flags in parse_options(mount.options).propagation)
        return whole and apart and _place(mount.destination) == "/dev/shm" and self._spec.is_new("ipc")

    def _replaced(self, place: str, source: str) -> str:
        """Return a path to the file that the container has mounted on `place` if `source` is another one, else "".

        The path uses a descriptor of the directory, which stays open, so that no link that the container puts there
        can lead out of it.
        """
        if place not in {mount.place for mount in self._inside}:
            return ""
        try:
            root = os.open(f"/proc/{self._state.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                directory = syscalls.open_in_root(root, os.path.dirname(place).lstrip("/") or ".", os.O_PATH)
            finally:
                os.close(root)
            seen = os.stat(os.path.basename(place), dir_fd=directory, follow_symlinks=False)
        except OSError:
            return ""  # the container does not run, or has put something else there
        try:
            here = os.stat(source)
            same = (here.st_dev, here.st_ino) == (seen.st_dev, seen.st_ino)
        except OSError:
            same = False
        if same or not stat.S_ISREG(seen.st_mode):
            os.close(directory)
            return ""
        return f"/proc/{os.getpid()}/fd/{directory}/{os.path.basename(place)}"

    def _leave(self, place: str, source: str, there: str, directory: bool) -> None:
        """Plan a mount whose source the target has itself, at `there`."""
        self.sources[place] = there
        self.bound.append((place, source, there))
        self.needed.append(Needed(place, there, directory))

    def _copy(self, place: str, source: str, mode: int, *, constant: bool) -> None:
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            self.problem("volume", place, f"{source} cannot be copied: it is neither a directory nor a regular file")
            return
        unlike = self._unlike(place, source)
        if unlike:
            self.problem("volume", place, unlike)
            return
        there = self.sources[place] = source if is_place(source) else self._own(place, source)
        self.trees.append(Tree(place, source, there, stat.S_ISREG(mode), UNKNOWN if constant else ""))

    def _unlike(self, place: str, source: str) -> str:
        """Return why `source` no longer is what the container sees at `place`, "" if it is.

        Only files that this host sees can be sent; later mounts on the host hide those that the container has.
        """
        inside = {mount.place for mount in self._inside}
        try:
            here, seen = os.stat(source), os.stat(f"/proc/{self._state.pid}/root{place}", follow_symlinks=False)
        except OSError:
            return ""  # the container does not run, or has put something else there
        if place in inside and (here.st_dev, here.st_ino) != (seen.st_dev, seen.st_ino):
            return f"{source} was replaced on this host after the container had mounted it: it cannot be copied"
        for mount in self._mounts:
            rest = mount.place[len(source.rstrip("/")) :]
            if mount.place != source and is_below(mount.place, source) and place.rstrip("/") + rest not in inside:
                return f"{mount.place} is mounted on this host and hides files that the container sees"
        return ""

    def _own(self, place: str, source: str) -> str:
        """Return a path at the target that belongs to this container alone and keeps the last part of the name."""
        mount_point = place.strip("/").replace("_", "__").replace("/", "_")
        own = hashlib.sha256(self._state.created.encode()).hexdigest()[:8]  # another container may have had the id
        return f"{VOLUMES}/{self._state.id}-{own}/{mount_point}/{os.path.basename(source)}"

    def overlay(self, mount: Mount, policy: str | None) -> None:
        place = _place(mount.destination)
        layers = _layers(mount)
        paths = [path for paths in layers.values() for path in paths]
        if not layers.get("lowerdir") or not all(is_place(path) and os.path.isdir(path) for path in paths):
            self.problem(
                "overlay", place, f"its layers are not all plain directories: {':'.join(paths) or 'none given'}"
            )
            return
        if policy not in (None, "copy", "shared"):
            self.problem(
                "overlay", place, f"--volume {place}={policy}: the layers of an overlay cannot change their path"
            )
        elif policy == "shared":
            self.needed += [Needed(f"{place} {kind}", path, True) for kind, paths in layers.items() for path in paths]
        else:
            if layers.get("upperdir") and _has_index(mount):
                text = "has an index (index=on or nfs_export=on), which cannot be sent: data written to a file by one"
                self.problem("overlay-index", place, f"{text} of its names would not be seen by the others")
            for path in layers["lowerdir"]:
                self.trees.append(Tree(f"{place} lower", path, path, fingerprint=UNKNOWN))
            for path in layers.get("upperdir", []):
                self.trees.append(Tree(f"{place} upper", path, path, upper=True))
            for path in layers.get("workdir", []):
                self.trees.append(Tree(f"{place} work", path, path, empty=True))


def plan(state: State, spec: Spec, volumes: Mapping[str, str]) -> Plan:
    """Return the plan for all mounts of the container. Raises UsageError if a --volume names none of its mounts."""
    planner = _Planner(state, spec, mountinfo.read())
    left = dict(volumes)
    for mount in spec.mounts:
        if mount.is_bind:
            planner.bind(mount, left.pop(_place(mount.destination), None))
        elif mount.type == "overlay":
            planner.overlay(mount, left.pop(_place(mount.destination), None))
    if left:
        places = [mount.destination for mount in spec.mounts if mount.is_bind or mount.type == "overlay"]
        raise UsageError(
            f"--volume {next(iter(left))}: container {state.id} has no bind mount or overlay at this path",
            remedy=f"its mounts: {', '.join(places)}" if places else "it has none: leave the option out",
        )
    return Plan(
        tuple(planner.trees),
        tuple(planner.needed),
        tuple(planner.sources.items()),
        tuple(planner.bound),
        tuple(planner.problems),
        tuple(planner.tmpfs),
    )


def _as_tmpfs(mount: Mount, source: str) -> Mount:
    """Return the container's own tmpfs that replaces a bind mount of a whole tmpfs."""
    size, mode = os.statvfs(source), stat.S_IMODE(os.stat(source).st_mode)
    options = [option for option in mount.options if option not in ("bind", "rbind")]
    options += [f"mode={mode:o}", f"size={size.f_blocks * size.f_frsize}"]
    return mount.replace(type="tmpfs", source="tmpfs", options=tuple(options))


def _is_readonly(mount: Mount) -> bool:
    options = parse_options(mount.options)
    return bool(options.flags & MS_RDONLY)


def _has_index(mount: Mount) -> bool:
    """Return whether an overlay indexes copied-up files, by file handles that are valid on this host only."""
    for name in ("index", "nfs_export"):
        said = [option for option in ",".join(mount.options).split(",") if option.partition("=")[0] == name]
        if said[-1] == f"{name}=on" if said else f"{name}=Y" in overlay_defaults():
            return True
    return False


def _layers(mount: Mount) -> dict[str, list[str]]:
    r"""Return the directories of an overlay by kind. In lowerdir ":" separates paths, and "\:" stands for a colon."""
    found: dict[str, list[str]] = {}
    for option in ",".join(mount.options).split(","):
        kind, equals, value = option.partition("=")
        if not equals:
            continue
        if kind == "lowerdir":
            parts = [part for part in re.split(r"(?<!\\):", value) if part]
            found.setdefault(kind, []).extend(_ESCAPED.sub(r"\1", part) for part in parts)
        elif kind in ("lowerdir+", "datadir+"):
            found.setdefault("lowerdir", []).append(value)
        elif kind in ("upperdir", "workdir"):
            found[kind] = [_ESCAPED.sub(r"\1", value)]
    return found
