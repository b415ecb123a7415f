"""`checkpoint` and `restore` as runc has them: what `move` refuses by its house rules is carried here."""

import json
import os
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from criu_rpc.swrk import find
from tests.support.hosts import COUNT, write_bundle
from tests.support.pybox import write_python_bundle
from tests.system.conftest import Local

CRIU = find()
IDS = [{"containerID": 0, "hostID": 100000, "size": 65536}]
ERRNO = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}


class Images:
    def __init__(self, directory: Path) -> None:
        self.images, self.work = directory / "images", directory / "work"

    def flags(self, *more: str) -> list[str]:
        return ["--image-path", str(self.images), "--work-path", str(self.work), *more]


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images(tmp_path)


def change(bundle: Path, **linux: Any) -> dict[str, Any]:
    """Change fields of `linux` in a bundle's config.json; returns all of it."""
    path = bundle / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config["linux"] |= linux
    path.write_text(json.dumps(config))
    return config


def counted(pymigrate: Local, beyond: int, container: str = "ckpt") -> list[int]:
    """What a counting container has written here, once it is beyond a number."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        numbers = [int(line) for line in pymigrate("logs", container).stdout.split()]
        if numbers and numbers[-1] > beyond:
            return numbers
    raise AssertionError(f"{container} does not count beyond {beyond}")


def there_and_back(pymigrate: Local, bundle: Path, images: Images, *flags: str) -> tuple[int, int]:
    """Run, checkpoint, restore; the last number before and the first one after."""
    pymigrate("run", "-d", "-b", bundle, "ckpt")
    before = counted(pymigrate, 3)[-1]
    pymigrate("checkpoint", *images.flags(*flags), "ckpt")
    assert pymigrate("list", "-q").stdout == ""
    pymigrate("restore", "-d", "-b", bundle, *images.flags(*flags), "ckpt")
    return before, counted(pymigrate, before)[0]


@pytest.mark.parametrize(
    "linux",
    [
        {},
        {"seccomp": ERRNO},
        {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]},
        {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup", "time")]},
    ],
    ids=["plain", "seccomp", "no-cgroup-namespace", "time-namespace"],
)
def test_it_goes_on_where_it_was(pymigrate: Local, bundle: Path, images: Images, linux: dict[str, Any]) -> None:
    change(bundle, **linux)
    before, after = there_and_back(pymigrate, bundle, images)
    assert before < after < before + 500
    assert pymigrate("exec", "ckpt", "mkdir", "/tmp/x", check=False).returncode == (1 if "seccomp" in linux else 0)


def test_user_namespace(pymigrate: Local, bundle: Path, images: Images) -> None:
    config = change(bundle, uidMappings=IDS, gidMappings=IDS)
    config["linux"]["namespaces"].append({"type": "user"})
    del config["linux"]["resources"]
    (bundle / "config.json").write_text(json.dumps(config))
    for path in [bundle / "rootfs", *(bundle / "rootfs").rglob("*")]:
        os.chown(path, 100000, 100000, follow_symlinks=False)
    (bundle.parent / "unreachable").mkdir(mode=0o700)
    before, after = there_and_back(pymigrate, bundle, images)
    assert before < after < before + 500
    assert pymigrate("exec", "ckpt", "cat", "/proc/self/uid_map").stdout.split() == ["0", "100000", "65536"]


def test_writable_root_and_bind_mount(pymigrate: Local, tmp_path: Path, images: Images) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    write_bundle(
        tmp_path / "b", f"exec 3>>/file 4>>/data/file; echo root >&3; echo bound >&4; {COUNT}",
        root={"path": "rootfs", "readonly": False},
    )  # fmt: skip
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["mounts"].append({"destination": "/data", "type": "bind", "source": str(outside), "options": ["rbind"]})
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    there_and_back(pymigrate, tmp_path / "b", images)
    assert (outside / "file").read_text() == "bound\n"
    pymigrate("exec", "ckpt", "sh", "-c", "echo more >> /data/file")
    assert (outside / "file").read_text() == "bound\nmore\n"


def test_leave_running_and_a_second_copy(pymigrate: Local, bundle: Path, images: Images) -> None:
    pymigrate("run", "-d", "-b", bundle, "ckpt")
    before = counted(pymigrate, 3)[-1]
    pymigrate("checkpoint", "--leave-running", *images.flags(), "ckpt")
    counted(pymigrate, before + 5)
    pymigrate("restore", "-d", "-b", bundle, *images.flags(), "copy")
    assert counted(pymigrate, before, "copy")[0] < before + 500


def test_auto_dedup_frees_what_is_restored(pymigrate: Local, bundle: Path, images: Images) -> None:
    there_and_back(pymigrate, bundle, images, "--auto-dedup")
    pages = [path.stat() for path in images.images.glob("pages-*.img")]
    assert pages
    assert sum(page.st_blocks * 512 for page in pages) < sum(page.st_size for page in pages) / 2


def test_a_file_for_criu_is_not_heeded_in_silence(pymigrate: Local, bundle: Path, images: Images) -> None:
    """CRIU would run a program that such a file names, and with an engine an image may name the file."""
    config = json.loads((bundle / "config.json").read_text())
    ran, conf = bundle / "ran", bundle / "conf"
    conf.write_text(f"action-script {bundle}/script\n")
    (bundle / "script").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (bundle / "script").chmod(0o755)
    (bundle / "config.json").write_text(json.dumps(config | {"annotations": {"org.criu.config": str(conf)}}))
    pymigrate("run", "-d", "-b", bundle, "ckpt")
    for argv in (("checkpoint",), ("restore", "-d", "-b", bundle)):
        done = pymigrate(*argv, *images.flags(), "ckpt")
        assert "warning: annotations.org.criu.config: is ignored" in done.stderr
    assert not ran.exists()


def test_a_paused_container(pymigrate: Local, bundle: Path, images: Images) -> None:
    pymigrate("run", "-d", "-b", bundle, "ckpt")
    before = counted(pymigrate, 3)[-1]
    pymigrate("pause", "ckpt")
    pymigrate("checkpoint", "--leave-running", *images.flags(), "ckpt")
    assert json.loads(pymigrate("state", "ckpt").stdout)["status"] == "paused"
    pymigrate("resume", "ckpt")
    counted(pymigrate, before + 3)


def test_foreground_restore_has_our_streams(pymigrate: Local, tmp_path: Path, images: Images) -> None:
    script = "i=0; while [ ! -e /tmp/end ]; do i=$((i+1)); echo $i; usleep 20000; done; exit 7"
    write_bundle(tmp_path / "b", script)
    pymigrate("run", "-d", "-b", tmp_path / "b", "ckpt")
    before = counted(pymigrate, 3)[-1]
    pymigrate("checkpoint", *images.flags(), "ckpt")
    running = subprocess.Popen(
        pymigrate.argv("restore", "-b", tmp_path / "b", *images.flags(), "ckpt"), stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert running.stdout is not None
    assert before < int(running.stdout.readline()) < before + 500
    pymigrate("exec", "ckpt", "touch", "/tmp/end", check=False)  # the container may end before `touch` does
    assert running.wait(10) == 7
    running.stdout.close()
    assert pymigrate("list", "-q").stdout == ""


def test_terminal(pymigrate: Local, tmp_path: Path, images: Images) -> None:
    write_bundle(tmp_path / "b", 'while read line; do echo "<$line>"; done')
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["process"]["terminal"] = True
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "console"))
        server.listen()
        server.settimeout(10)

        def master(*argv: object) -> int:
            running = subprocess.Popen(pymigrate.argv(*argv))
            connection, _ = server.accept()
            with connection:
                _, fds, _, _ = socket.recv_fds(connection, 64, 1)
            assert running.wait(10) == 0
            return fds[0]

        console = ["--console-socket", str(tmp_path / "console")]
        first = master("create", "-b", tmp_path / "b", *console, "ckpt")
        pymigrate("start", "ckpt")
        os.write(first, b"one\n")
        assert read_until(first, b"<one>")
        pymigrate("checkpoint", *images.flags(), "ckpt")
        os.close(first)
        second = master("restore", "-d", "-b", tmp_path / "b", *console, *images.flags(), "ckpt")
        os.write(second, b"two\n")
        assert read_until(second, b"<two>")
        os.close(second)


def read_until(fd: int, wanted: bytes) -> bool:
    got, deadline = b"", time.monotonic() + 10
    while wanted not in got and time.monotonic() < deadline:
        got += os.read(fd, 1024)
    return wanted in got


def test_a_failed_checkpoint_leaves_it_running(pymigrate: Local, bundle: Path, images: Images) -> None:
    pymigrate("run", "-d", "-b", bundle, "ckpt")
    before = counted(pymigrate, 3)[-1]
    done = pymigrate("checkpoint", *images.flags("--parent-path", "nowhere"), "ckpt", check=False)
    assert (done.returncode, "--parent-path nowhere" in done.stderr) == (6, True)
    images.images.rmdir()
    images.images.write_text("")
    done = pymigrate("checkpoint", *images.flags(), "ckpt", check=False)
    assert done.returncode != 0
    assert re.search(r"images.*: (cannot be made|Not a directory|File exists)", done.stderr)
    counted(pymigrate, before + 5)


def test_garbage_images(pymigrate: Local, bundle: Path, images: Images) -> None:
    images.images.mkdir()
    (images.images / "inventory.img").write_bytes(b"garbage")
    done = pymigrate("restore", "-d", "-b", bundle, *images.flags(), "ckpt", check=False)
    assert done.returncode == 9
    assert "restore.log" in done.stderr
    assert pymigrate("list", "-q").stdout == ""
    (images.images / "descriptors.json").write_text("{")
    done = pymigrate("restore", "-d", "-b", bundle, *images.flags(), "ckpt", check=False)
    assert (done.returncode, "descriptors.json" in done.stderr) == (6, True)


def test_a_volume_below_a_symbolic_link(pymigrate: Local, bundle: Path, images: Images, tmp_path: Path) -> None:
    """As /var/run is one to /run: CRIU knows it by where it is mounted."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").touch()
    config = json.loads((bundle / "config.json").read_text())
    for destination in ("/link/x", "//srv/./y/"):
        volume = {"destination": destination, "source": str(tmp_path / "data"), "options": ["bind", "ro"]}
        config["mounts"].append({"type": "none", **volume})
    (bundle / "config.json").write_text(json.dumps(config))
    (bundle / "rootfs" / "srv").mkdir(exist_ok=True)
    (bundle / "rootfs" / "link").symlink_to("srv")
    pymigrate("run", "-d", "-b", bundle, "ckpt")
    before = counted(pymigrate, 3)[-1]
    pymigrate("validate", "ckpt", "--volume", "/link/x=shared", "--volume", "/srv/y=shared")
    for _ in range(2):
        pymigrate("checkpoint", *images.flags(), "ckpt")
        pymigrate("restore", "-d", "-b", bundle, *images.flags("ckpt"))
        before = counted(pymigrate, before)[-1]
    assert pymigrate("exec", "ckpt", "ls", "/link/x", "/srv/y").stdout.split().count("file") == 2


def test_files_of_cgroups_made_inside(pymigrate: Local, images: Images, tmp_path: Path) -> None:
    """systemd watches those of its units: they are there when the processes come back."""
    program = """
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
top = "/tmp/cgroup"
os.mkdir(top)
assert libc.mount(b"cgroup2", top.encode(), b"cgroup2", 0, None) == 0
os.makedirs(top + "/jobs/one")
events = os.open(top + "/jobs/one/cgroup.events", os.O_RDONLY)
watch = libc.inotify_init1(0)
assert libc.inotify_add_watch(watch, (top + "/jobs/one/cgroup.events").encode(), 2) > 0
number = 0
while True:
    number += os.pread(events, 100, 0).startswith(b"populated 0")
    print(number, flush=True)
    time.sleep(0.05)
"""
    write_python_bundle(tmp_path / "b", program)
    there_and_back(pymigrate, tmp_path / "b", images)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="elsewhere there is no such call")
def test_poll_without_a_timeout_goes_on(pymigrate: Local, images: Images, tmp_path: Path) -> None:
    """`tail -f` and others take EINTR for an error when they have no handler of a signal; frozen before or not."""
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
os.mkfifo("/tmp/fifo")
fifo = os.open("/tmp/fifo", os.O_RDWR)
print("0", flush=True)
for number in range(1, 4):
    waiting = ctypes.create_string_buffer(fifo.to_bytes(4, "little") + b"\\1\\0\\0\\0", 8)
    found = libc.poll(waiting, 1, -1)
    os.read(fifo, 1) if found == 1 else None
    print(number if found == 1 else -ctypes.get_errno(), flush=True)
"""
    write_python_bundle(tmp_path / "b", program)
    pymigrate("run", "-d", "-b", tmp_path / "b", "ckpt")
    counted(pymigrate, -1)
    for number in range(1, 3):
        if number == 2:
            pymigrate("pause", "ckpt")
            pymigrate("resume", "ckpt")
        pymigrate("checkpoint", *images.flags(), "ckpt")
        pymigrate("restore", "-d", "-b", tmp_path / "b", *images.flags("ckpt"))
        pymigrate("exec", "ckpt", "sh", "-c", "printf x > /tmp/fifo")
        assert counted(pymigrate, number - 1) == [number]  # since it was restored


def test_engines_probe_these(pymigrate: Local) -> None:
    assert pymigrate("checkpoint", "--help").returncode == 0
    asked = pymigrate("restore", "--lsm-mount-context", check=False)
    assert "flag needs an argument" in asked.stderr


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def wait_for_line(path: Path, words: str) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if path.exists() and words in path.read_text():
            return
    raise AssertionError(f"{path} never says {words!r}")


def test_memory_to_a_page_server(pymigrate: Local, bundle: Path, images: Images) -> None:
    pymigrate("run", "-d", "-b", bundle, "ckpt")
    before = counted(pymigrate, 3)[-1]
    images.images.mkdir()
    port = free_port()
    log = images.images / "server.log"
    server = subprocess.Popen(
        [CRIU, "page-server", "-D", images.images, "--address", "127.0.0.1", "--port", str(port), "-o", log, "-v4"]
    )  # fmt: skip
    wait_for_line(log, "Starting page server")
    pymigrate("checkpoint", *images.flags("--page-server", f"127.0.0.1:{port}"), "ckpt")
    assert server.wait(10) == 0
    pymigrate("restore", "-d", "-b", bundle, *images.flags(), "ckpt")
    assert before < counted(pymigrate, before)[0] < before + 500


def test_lazy_pages(pymigrate: Local, bundle: Path, images: Images) -> None:
    """The memory stays with the dump, which serves it; the restored container fetches it page by page."""
    pymigrate("run", "-d", "-b", bundle, "ckpt")
    before = counted(pymigrate, 3)[-1]
    port, (ready, told) = free_port(), os.pipe()
    flags = ["--lazy-pages", "--page-server", f"127.0.0.1:{port}", "--status-fd", str(told)]
    dump = subprocess.Popen(pymigrate.argv("checkpoint", *images.flags(*flags), "ckpt"), pass_fds=[told])
    os.close(told)
    assert os.read(ready, 1) == b"\0"
    os.close(ready)
    other = Local(pymigrate.root.parent / "other")
    config = json.loads((bundle / "config.json").read_text())
    config["linux"]["cgroupsPath"] = "/pymigrate/ckpt-lazy"
    (bundle / "config.json").write_text(json.dumps(config))
    images.work = images.work.parent / "lazy"
    images.work.mkdir()
    daemon = subprocess.Popen(
        [CRIU, "lazy-pages", "--page-server", "--address", "127.0.0.1", "--port", str(port), "-D", images.images,
         "-W", images.work, "-o", "lazy.log", "-v4"],
    )  # fmt: skip
    wait_for_line(images.work / "lazy.log", "Waiting for incoming connections")
    try:
        other("restore", "-d", "--lazy-pages", "-b", bundle, *images.flags(), "ckpt")
        assert dump.wait(30) == 0
        assert daemon.wait(30) == 0
        assert before < counted(other, before)[0] < before + 500
    finally:
        other("delete", "--force", "ckpt")
        for process in (daemon, dump):
            process.kill()
            process.wait()
