"""Watches of files that CRIU finds a name for, and of others."""

import ctypes
import os
import struct
from collections.abc import Callable, Iterator

from harness import call, equal, kind, make

_IN_OPEN = 0x20
_FAN_OPEN, _FAN_MARK_MOUNT, _FAN_MARK_FILESYSTEM = 0x20, 0x10, 0x100


def _text(path: str) -> ctypes.c_char_p:
    return ctypes.c_char_p(path.encode())


def _watch(path: str, touch: Callable[[], object], after: Callable[[], object] = lambda: None) -> Iterator[None]:
    """A watch of `path`, where `after` happens when it has been set; it fires when the file is opened by `touch`."""
    fd = make("inotify_init1", os.O_NONBLOCK)
    call("inotify_add_watch", fd, _text(path), _IN_OPEN)
    after()
    while True:
        yield
        touch()
        equal(struct.unpack_from("iI", os.read(fd, 4096))[1] & _IN_OPEN, _IN_OPEN, "the event")


def _opened(path: str) -> Callable[[], object]:
    return lambda: os.close(os.open(path, os.O_RDONLY))


def _made(path: str) -> str:
    with open(path, "w"):
        return path


@kind
def inotify_renamed() -> Iterator[None]:
    os.makedirs("/tmp/renamed/below")
    _made("/tmp/renamed/below/file")
    return _watch(
        "/tmp/renamed/below/file", _opened("/tmp/renamed-since/below/file"),
        lambda: os.rename("/tmp/renamed", "/tmp/renamed-since"),
    )  # fmt: skip


@kind
def inotify_other_name() -> Iterator[None]:
    """A file with two names, one of which is removed."""
    os.link(_made("/tmp/other-name"), "/tmp/first-name")
    return _watch("/tmp/other-name", _opened("/tmp/other-name"), lambda: os.unlink("/tmp/first-name"))


@kind
def inotify_sysfs() -> Iterator[None]:
    return _watch("/sys/kernel/uevent_seqnum", _opened("/sys/kernel/uevent_seqnum"))


@kind
def inotify_root() -> Iterator[None]:
    return _watch("/", lambda: os.listdir("/"))


@kind
def inotify_one_shot() -> Iterator[None]:
    """A watch that ends with its first event."""
    fd = make("inotify_init1", os.O_NONBLOCK)
    call("inotify_add_watch", fd, _text(_made("/tmp/one-shot")), _IN_OPEN | 0x80000000)
    while True:
        yield
        _opened("/tmp/one-shot")()
        _opened("/tmp/one-shot")()
        data = os.read(fd, 4096)
        found = [struct.unpack_from("iI", data, start)[1] for start in range(0, len(data), 16)]
        equal(found, [_IN_OPEN, 0x8000], "events")  # IN_IGNORED


@kind
def inotify_unlinked() -> Iterator[None]:
    fd = os.open(_made("/tmp/unlinked"), os.O_RDONLY)
    return _watch("/tmp/unlinked", _opened(f"/proc/self/fd/{fd}"), lambda: os.unlink("/tmp/unlinked"))


@kind
def inotify_proc() -> Iterator[None]:
    return _watch("/proc/uptime", _opened("/proc/uptime"))


@kind
def inotify_terminals() -> Iterator[None]:
    return _watch("/dev/pts", lambda: os.listdir("/dev/pts"))


@kind
def inotify_queues() -> Iterator[None]:
    return _watch("/dev/mqueue", lambda: os.listdir("/dev/mqueue"))


@kind
def inotify_covered() -> Iterator[None]:
    """Something else is mounted over it by now."""
    os.makedirs("/tmp/covered")
    _made("/tmp/covered/file")
    fd = os.open("/tmp/covered/file", os.O_RDONLY)

    def cover() -> None:
        call("mount", _text("x"), _text("/tmp/covered"), _text("tmpfs"), 0, None)
        os.close(fd)

    return _watch("/tmp/covered/file", lambda: None, cover)


@kind
def inotify_overlay() -> Iterator[None]:
    return _watch(_made("/overlay/file"), _opened("/overlay/file"))


@kind
def inotify_bound() -> Iterator[None]:
    """A file that is mounted by itself: no directory that it lies in is in the container."""
    return _watch("/bound", _opened("/bound"))


@kind
def inotify_volume_unlinked() -> Iterator[None]:
    fd = os.open(_made("/volume/unlinked"), os.O_RDONLY)
    return _watch("/volume/unlinked", _opened(f"/proc/self/fd/{fd}"), lambda: os.unlink("/volume/unlinked"))


@kind
def inotify_unmounted() -> Iterator[None]:
    """The host still has mounted what this container had."""
    return _watch(_made("/volume/unmounted"), lambda: None, lambda: call("umount", _text("/volume")))


def _marked(path: str, flags: int) -> Iterator[None]:
    fd = make("fanotify_init", 0x2 | 0x200, os.O_RDONLY)  # FAN_NONBLOCK | FAN_REPORT_FID
    make("fanotify_mark", fd, 1 | flags, _FAN_OPEN, -100, _text(path))
    while True:
        yield
        _opened(path)()
        equal(struct.unpack_from("IBBHQ", os.read(fd, 4096))[4] & _FAN_OPEN, _FAN_OPEN, "the event")


@kind
def fanotify_mount() -> Iterator[None]:
    return _marked(_made("/tmp/marked-mount"), _FAN_MARK_MOUNT)


@kind
def fanotify_handles() -> Iterator[None]:
    return _marked(_made("/tmp/marked"), 0)


@kind
def fanotify_file_system() -> Iterator[None]:
    return _marked(_made("/tmp/marked-system"), _FAN_MARK_FILESYSTEM)


@kind
def fanotify_unlinked() -> Iterator[None]:
    fd = os.open(_made("/tmp/marked-unlinked"), os.O_RDONLY)
    steps = _marked("/tmp/marked-unlinked", 0)
    next(steps)
    os.unlink("/tmp/marked-unlinked")
    while True:
        yield
        os.fstat(fd)
        next(steps)
