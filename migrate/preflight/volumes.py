"""What becomes of a container's bind mounts and overlays when it moves: the source's plan, before the target is asked.

`--volume PATH=copy|shared|NEWPATH` says it for the bind mount on PATH. Where nothing is said: a network file system is
shared, read-only binds and single files are taken as the target has them (a small file that it lacks goes along), and a
directory of this host that the container may write to is refused: only the user knows. But the tmpfs that an engine has
mounted for a container's /dev/shm, and binds into it, is the container's own: it goes with the images, as others do.

What a container has mounted may have been replaced at its source since. A file that goes along is what the container
sees.
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

SMALL = 1 << 20  # bytes; a file bound by itself, up to this size, goes along where it is missing
_HOST = ("/proc", "/sys", "/dev")  # what every host has its own of
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True)
class Plan:
    """`trees` go along; `needed` must be there; `sources` says of each bind mount where its source is at the target.

    `bound` are bind mounts whose files the target has itself: destination, source here, source there. `tmpfs` are bind
    mounts that the target has as a tmpfs of the container's own.
    """

    trees: tuple[Tree, ...] = ()
    needed: tuple[Needed, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()
    bound: tuple[tuple[str, str, str], ...] = ()
    problems: tuple[Blocker, ...] = ()
    tmpfs: tuple[Mount, ...] = ()

    def spec(self, spec: Spec) -> Spec:
        """The spec to dump the container by: what goes with the images is not external."""
        own = {mount.destination: mount for mount in self.tmpfs}
        return spec.replace(mounts=tuple(own.get(mount.destination, mount) for mount in spec.mounts))

    def config(self, value: dict[str, Any]) -> str:
        """The container's config.json, of that value here, as the target must have it."""
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
        """The same with what the trees take on disk, and the fingerprints of those that do not change."""
        trees = []
        for tree in self.trees:
            if not tree.empty:
                path = Path(tree.source)
                constant = fingerprints.fingerprint(path) if tree.fingerprint else ""
                tree = dataclasses.replace(tree, size=fingerprints.size(path), fingerprint=constant)
            trees.append(tree)
        return dataclasses.replace(self, trees=tuple(trees))

    def with_found(self, found: set[str]) -> "Plan":
        """The same when the target has those of the trees, by name, that it may take as it has them."""
        taken = {tree.name: tree.source for tree in self.trees if tree.found and tree.name in found}
        return dataclasses.replace(
            self,
            trees=tuple(tree for tree in self.trees if tree.name not in taken),
            sources=tuple((dict(self.sources) | taken).items()),
            bound=(*self.bound, *((name, source, source) for name, source in taken.items())),
        )


def parse(options: list[str]) -> dict[str, str]:
    """--volume PATH=POLICY, each. Raises UsageError."""
    found: dict[str, str] = {}
    for option in options:
        place, equals, policy = option.partition("=")
        if not equals or not place.startswith("/") or not (policy in ("copy", "shared") or policy.startswith("/")):
            raise UsageError(f"--volume {option}: must be PATH=copy, PATH=shared or PATH=/NEW/PATH")
        if policy.startswith("/") and (".." in policy.split("/") or not policy.isprintable()):
            raise UsageError(f"--volume {option}: {policy!r} is no plain absolute path")
        if _place(place) in found:
            raise UsageError(f"--volume {option}: {place} was given before")
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
            self.problem("missing-source", place, f"{mount.source} cannot be seen here any more: {error.strerror}")
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
            export = where.export(path or source) if policy is None else ""  # the user says that it is the same
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
        """The mount of a network file system that the container has at `place`, and a path on it ("": the source)."""
        inside = [mount for mount in self._inside if mount.place == place]
        if inside:  # what is mounted at the source may be another one by now
            return (inside[-1], place) if inside[-1].network else None
        return (on, "") if on is not None and on.network else None

    def _is_own_tmpfs(self, mount: Mount, source: str, on: mountinfo.Mount | None) -> bool:
        """Whether it is the whole of a tmpfs, for a container that has its shared memory for itself."""
        whole = on is not None and (on.fstype, on.place, on.root) == ("tmpfs", source, "/")
        apart = all(flags & MS_PRIVATE for flags in parse_options(mount.options).propagation)
        return whole and apart and _place(mount.destination) == "/dev/shm" and self._spec.is_new("ipc")

    def _replaced(self, place: str, source: str) -> str:
        """A path to the file that the container has mounted on `place`, if what is at `source` is not that, or "".

        By a descriptor of the directory, which stays open: no link that the container may put there leads out of it.
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
            return ""  # it does not run, or has put something else there
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
        """The target has it itself."""
        self.sources[place] = there
        self.bound.append((place, source, there))
        self.needed.append(Needed(place, there, directory))

    def _copy(self, place: str, source: str, mode: int, *, constant: bool) -> None:
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            self.problem("volume", place, f"{source} is neither a directory nor a file: it cannot be copied")
            return
        unlike = self._unlike(place, source)
        if unlike:
            self.problem("volume", place, unlike)
            return
        there = self.sources[place] = source if is_place(source) else self._own(place, source)
        self.trees.append(Tree(place, source, there, stat.S_ISREG(mode), UNKNOWN if constant else ""))

    def _unlike(self, place: str, source: str) -> str:
        """Why what lies at `source` by now is not what the container sees at `place`, "" if it is.

        Only what this host sees there can be sent; what was mounted or made there later covers what the container has.
        """
        inside = {mount.place for mount in self._inside}
        try:
            here, seen = os.stat(source), os.stat(f"/proc/{self._state.pid}/root{place}", follow_symlinks=False)
        except OSError:
            return ""  # it does not run, or has put something else there
        if place in inside and (here.st_dev, here.st_ino) != (seen.st_dev, seen.st_ino):
            return f"{source} is another one here by now than the container has mounted"
        for mount in self._mounts:
            rest = mount.place[len(source.rstrip("/")) :]
            if mount.place != source and is_below(mount.place, source) and place.rstrip("/") + rest not in inside:
                return f"{mount.place} is mounted here, and the container sees what is below that"
        return ""

    def _own(self, place: str, source: str) -> str:
        """A place of this container's own, which keeps the last part of the name."""
        mount_point = place.strip("/").replace("_", "__").replace("/", "_")
        own = hashlib.sha256(self._state.created.encode()).hexdigest()[:8]  # others may have its id
        return f"{VOLUMES}/{self._state.id}-{own}/{mount_point}/{os.path.basename(source)}"

    def overlay(self, mount: Mount, policy: str | None) -> None:
        place = _place(mount.destination)
        layers = _layers(mount)
        paths = [path for paths in layers.values() for path in paths]
        if not layers.get("lowerdir") or not all(is_place(path) and os.path.isdir(path) for path in paths):
            self.problem("overlay", place, f"the layers {':'.join(paths) or 'of it'} are not all plain directories")
            return
        if policy not in (None, "copy", "shared"):
            self.problem("overlay", place, "its layers cannot lie at another place there")
        elif policy == "shared":
            self.needed += [Needed(f"{place} {kind}", path, True) for kind, paths in layers.items() for path in paths]
        else:
            if layers.get("upperdir") and _has_index(mount):
                text = "has an index (index=on or nfs_export=on): what was written to a file by one of its names"
                self.problem("overlay-index", place, f"{text} would not be seen by the others")
            for path in layers["lowerdir"]:
                self.trees.append(Tree(f"{place} lower", path, path, fingerprint=UNKNOWN))
            for path in layers.get("upperdir", []):
                self.trees.append(Tree(f"{place} upper", path, path, upper=True))
            for path in layers.get("workdir", []):
                self.trees.append(Tree(f"{place} work", path, path, empty=True))


def plan(state: State, spec: Spec, volumes: Mapping[str, str]) -> Plan:
    """What to do with each mount of the container. Raises UsageError for a --volume that names no mount of it."""
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
            f"--volume {next(iter(left))}: container {state.id} has no bind mount and no overlay there",
            remedy=f"it has: {', '.join(places)}" if places else "it has none at all",
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
    """The mount, whose source is all of a tmpfs, as a tmpfs of the container's own."""
    size, mode = os.statvfs(source), stat.S_IMODE(os.stat(source).st_mode)
    options = [option for option in mount.options if option not in ("bind", "rbind")]
    options += [f"mode={mode:o}", f"size={size.f_blocks * size.f_frsize}"]
    return mount.replace(type="tmpfs", source="tmpfs", options=tuple(options))


def _is_readonly(mount: Mount) -> bool:
    options = parse_options(mount.options)
    return bool(options.flags & MS_RDONLY)


def _has_index(mount: Mount) -> bool:
    """Whether an overlay keeps an index of what it has copied up, by handles of files that no other host knows."""
    for name in ("index", "nfs_export"):
        said = [option for option in ",".join(mount.options).split(",") if option.partition("=")[0] == name]
        if said[-1] == f"{name}=on" if said else f"{name}=Y" in overlay_defaults():
            return True
    return False


def _layers(mount: Mount) -> dict[str, list[str]]:
    """The directories of an overlay by kind. In a list of lower ones a backslash keeps a colon from ending a path."""
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
