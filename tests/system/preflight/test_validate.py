"""What validate finds in living containers, each thing really there."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from migrate.preflight import sockets
from migrate.preflight.container import container_blockers
from runtime.state.kept_config import load_kept
from runtime.state.store import Store
from tests.support.hosts import ABLE, COUNT, write_bundle
from tests.support.pybox import write_python_bundle
from tests.system.conftest import PYMIGRATE, Local


def rules(pymigrate: Local, *options: str) -> list[str]:
    done = pymigrate("--json", "validate", "c", *options, check=False)
    value: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if value["movable"] else 3)
    return [blocker["rule"] for blocker in value["blockers"]]


def test_the_default_bundle_can_move(pymigrate: Local, bundle: Path) -> None:
    pymigrate("run", "-d", "-b", bundle, "c")
    assert rules(pymigrate) == []
    assert pymigrate("validate", "c").stdout == "c can move\n"


def test_what_was_settled_is_not_looked_at_again(
    pymigrate: Local, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy server the next connection may be there by then."""
    pymigrate("run", "-d", "-b", bundle, "c")
    store, looks, survey = Store(pymigrate.root), [], sockets.survey
    monkeypatch.setattr(sockets, "survey", lambda pid: looks.append(pid) or survey(pid))
    state = store.load("c")
    assert container_blockers(state, load_kept(state), patience=5) == []
    assert len(looks) == 1


def test_a_stopped_container_cannot(pymigrate: Local, bundle: Path) -> None:
    pymigrate("create", "-b", bundle, "c")
    assert rules(pymigrate) == ["status"]


def test_a_namespace_of_a_process_of_this_host_is_not_there_elsewhere(pymigrate: Local, bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    (network,) = (item for item in config["linux"]["namespaces"] if item["type"] == "network")
    network["path"] = f"/proc/{os.getpid()}/ns/net"
    (bundle / "config.json").write_text(json.dumps(config))
    pymigrate("run", "-d", "-b", bundle, "c")
    assert rules(pymigrate) == ["joined-namespace"]


def test_house_rules_and_a_missing_tmp_all_at_once(pymigrate: Local, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", COUNT, root={"path": "rootfs", "readonly": False})
    path = tmp_path / "b" / "config.json"
    config = json.loads(path.read_text())
    config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] != "/tmp"]
    config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"}
    config["process"]["terminal"] = True
    path.write_text(json.dumps(config))
    pymigrate("run", "-d", "-b", tmp_path / "b", "c")
    (tmp_path / "b" / "rootfs" / "tmp").rmdir()
    path.unlink()  # a container is what it was made of
    assert rules(pymigrate) == ["seccomp", "terminal", "writable-rootfs", "rootfs-tmp"]
    assert rules(pymigrate, "--allow", "writable-rootfs") == ["seccomp", "terminal", "rootfs-tmp"]
    text = pymigrate("validate", "c", check=False).stdout
    assert "config.json: process.terminal" in text


@pytest.mark.parametrize(("named", "found"), [(False, ["submount"]), (True, [])])
def test_what_is_mounted_below_a_bind_mount(pymigrate: Local, tmp_path: Path, named: bool, found: list[str]) -> None:
    data = tmp_path / "data"
    below = data / "sub dir"  # mountinfo(5) writes the space as \040
    below.mkdir(parents=True)
    mounts = [{"destination": "/data", "type": "bind", "source": str(data), "options": ["rbind", "ro"]}]
    if named:
        mounts.append({"destination": "/data/sub dir", "type": "bind", "source": str(below), "options": ["bind", "ro"]})
    write_bundle(tmp_path / "b", COUNT)
    path = tmp_path / "b" / "config.json"
    config = json.loads(path.read_text())
    config["mounts"] += mounts
    path.write_text(json.dumps(config))
    subprocess.run(["mount", "-t", "tmpfs", "pymigrate-test", below], check=True)
    try:
        pymigrate("run", "-d", "-b", tmp_path / "b", "c")
        shared = [option for mount in mounts for option in ("--volume", f"{mount['destination']}=shared")]
        assert rules(pymigrate, *shared) == found
    finally:
        pymigrate("delete", "--force", "c")
        subprocess.run(["umount", below], check=True)


def test_file_systems(pymigrate: Local, tmp_path: Path) -> None:
    """What CRIU cannot mount again is named by its place and type; all that is not named can be dumped and restored."""
    program = """
import os, subprocess, time
libc = __import__("ctypes").CDLL(None, use_errno=True)
def mount(source, place, kind, flags=0):
    os.makedirs(place, exist_ok=True)
    if libc.mount(source.encode(), place.encode(), kind.encode(), flags, None):
        print("cannot mount", kind, os.strerror(__import__("ctypes").get_errno()), flush=True)
for kind in ("tmpfs", "proc", "sysfs", "mqueue", "securityfs", "debugfs", "cgroup2"):
    mount(kind, "/tmp/" + kind, kind)
os.makedirs("/tmp/tmpfs/a/b")
mount("/tmp/tmpfs/a/b", "/tmp/part", "none", 4096)
mount("/data/below", "/tmp/of-the-host", "none", 4096)
mount("/usr/bin", "/tmp/more-of-the-host", "none", 4096)
print("ready", flush=True)
if os.read(0, 1) == b"":
    while not os.path.exists("/data/go"):
        time.sleep(0.01)
mount("ramfs", "/tmp/ramfs", "ramfs")
mount("none", "/tmp/huge", "hugetlbfs")
if os.fork() == 0:
    libc.unshare(0x20000)
    mount("ramfs", "/tmp/nested", "ramfs")
    print("nested", flush=True)
time.sleep(1000)
"""
    (tmp_path / "data" / "below").mkdir(parents=True)
    write_python_bundle(tmp_path / "b", program)
    path = tmp_path / "b" / "config.json"
    config = json.loads(path.read_text())
    data = {"destination": "/data", "type": "none", "source": str(tmp_path / "data"), "options": ["rbind", "rw"]}
    config["mounts"].append(data)
    path.write_text(json.dumps(config))
    pymigrate("run", "-d", "-b", tmp_path / "b", "c")
    wait_for_line(pymigrate, "ready")
    allow = ("--volume", "/data=shared", "--volume", "/usr=shared")
    assert rules(pymigrate, *allow) == []
    images = ("--image-path", tmp_path / "images", "--work-path", tmp_path / "work")
    pymigrate("checkpoint", *images, "c")
    pymigrate("restore", "-d", "-b", tmp_path / "b", *images, "c")
    (tmp_path / "data" / "go").touch()
    wait_for_line(pymigrate, "nested")
    found = json.loads(pymigrate("--json", "validate", "c", *allow, check=False).stdout)["blockers"]
    assert {blocker["rule"] for blocker in found} == {"file-system"}
    text = " ".join(blocker["where"] + " " + blocker["problem"] for blocker in found)
    assert "/tmp/ramfs has a file system of type ramfs" in text
    assert "/tmp/huge has a file system of type hugetlbfs" in text
    assert "/tmp/nested, in the mount namespace of process " in text


def wait_for_line(pymigrate: Local, line: str) -> None:
    deadline = time.monotonic() + 15
    while line not in (said := pymigrate("logs", "c").stdout.splitlines()):
        assert time.monotonic() < deadline, said


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        ("libc.syscall(425, 8, ctypes.create_string_buffer(120))", "io-uring"),
        ("libc.syscall(323, 0)", "special-file"),
        ("os.open('/dev/hwdev', os.O_RDONLY)", "device"),
        ("libc.eventfd(0, 0)", None),
        ("libc.epoll_create1(0)", None),
        ("libc.inotify_init()", None),
        ("os.open('/dev/urandom', os.O_RDONLY)", None),
        ("socket.socketpair()", None),
    ],
    ids=["io_uring", "userfaultfd", "kmsg", "eventfd", "epoll", "inotify", "urandom", "socketpair"],
)
def test_descriptors(pymigrate: Local, tmp_path: Path, make: str, rule: str | None) -> None:
    """A Python of this machine, bound into the container, opens them; what is not found really can be dumped."""
    program = (
        f"import ctypes, os, socket, time; libc = ctypes.CDLL(None, use_errno=True); x = {make}; "
        "print('skip' if isinstance(x, int) and x < 0 else 'open', flush=True); time.sleep(1000)"
    )
    write_bundle(tmp_path / "b", "unused")
    path = tmp_path / "b" / "config.json"
    config = json.loads(path.read_text())
    config["process"]["args"] = ["/usr/bin/python3", "-I", "-S", "-c", program]
    for place, source in (("/usr", "/usr"), ("/lib", "/usr/lib"), ("/lib64", "/usr/lib64")):
        config["mounts"].append({"destination": place, "source": source, "type": "bind", "options": ["bind", "ro"]})
    (tmp_path / "b" / "rootfs" / "lib64").unlink()
    config["process"]["capabilities"] = ABLE
    config["linux"]["devices"] = [{"path": "/dev/hwdev", "type": "c", "major": 1, "minor": 11}]
    config["linux"]["resources"]["devices"].append({"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"})
    path.write_text(json.dumps(config))
    pymigrate("run", "-d", "-b", tmp_path / "b", "c")
    while not (said := pymigrate("logs", "c").stdout):
        assert pymigrate("logs", "c").stderr == ""
    if said == "skip\n":
        pytest.skip("this kernel refuses it")
    assert rules(pymigrate) == ([rule] if rule else [])
    if rule is None:
        pymigrate("snapshot", "save", "c", tmp_path / "snapshot")


@pytest.mark.parametrize("held", ["open", "mapped"])
@pytest.mark.parametrize(("size", "found"), [(20, []), (520, ["ghost-file"])])
def test_a_file_without_a_name(pymigrate: Local, tmp_path: Path, held: str, size: int, found: list[str]) -> None:
    """One that is not too large goes with the images."""
    program = "import mmap, os, time; fd = os.open('/srv', os.O_RDWR | os.O_TMPFILE); "
    program += f"os.posix_fallocate(fd, 0, {size} << 20); "
    program += "map = mmap.mmap(fd, 4096); os.close(fd); " if held == "mapped" else ""
    program += "print('ready', flush=True); time.sleep(1000)"
    write_python_bundle(tmp_path / "b", program, root={"path": "rootfs", "readonly": False})
    (tmp_path / "b" / "rootfs" / "srv").mkdir()
    pymigrate("run", "-d", "-b", tmp_path / "b", "c")
    while not pymigrate("logs", "c").stdout:
        assert pymigrate("logs", "c").stderr == ""
    assert rules(pymigrate, "--allow", "writable-rootfs") == found
    said = pymigrate("validate", "c", check=False).stdout
    assert ("was deleted and has 520 MiB" in said) == bool(found)
    allow = ("--allow", "writable-rootfs")
    done = pymigrate("snapshot", "save", "c", tmp_path / "snapshot", *allow, check=False)
    assert done.returncode == (3 if found else 0), done.stderr


def test_an_init_that_changed_its_user_is_hidden_once_it_was_restored(pymigrate: Local, tmp_path: Path) -> None:
    """In a user namespace: CRIU would fail to dump it then (open /proc/PID/ns from inside)."""
    program = "import os, time; os.setgid(7); os.setuid(7); print('changed'); time.sleep(1000)"
    write_python_bundle(tmp_path / "b", program)
    path = tmp_path / "b" / "config.json"
    config = json.loads(path.read_text())
    config["linux"]["namespaces"].append({"type": "user"})
    for kind in ("uidMappings", "gidMappings"):
        config["linux"][kind] = [{"containerID": 0, "hostID": 100000, "size": 1000}]
    config["process"]["capabilities"] = ABLE
    path.write_text(json.dumps(config))
    subprocess.run(["chown", "-Rh", "100000:100000", tmp_path / "b" / "rootfs"], check=True)
    pymigrate("run", "-d", "-b", tmp_path / "b", "c")
    while not pymigrate("logs", "c").stdout:
        pass
    assert rules(pymigrate) == []
    pymigrate("checkpoint", "--image-path", tmp_path / "images", "c")
    pymigrate("restore", "-d", "-b", tmp_path / "b", "--image-path", tmp_path / "images", "c")
    assert rules(pymigrate) == ["user-changed"]


def test_a_first_thread_that_has_ended(pymigrate: Local, tmp_path: Path) -> None:
    """Of a process below the first: CRIU does not carry zombies with threads."""
    program = """
import ctypes, os, threading, time
def count():
    print("ready", flush=True)
    time.sleep(1000)
if os.fork() == 0:
    threading.Thread(target=count).start()
    ctypes.CDLL(None).syscall(%d, 0)
os.wait()
"""
    write_python_bundle(tmp_path / "b", program % {"x86_64": 60}.get(os.uname().machine, 93))
    pymigrate("run", "-d", "-b", tmp_path / "b", "c")
    wait_for_line(pymigrate, "ready")
    deadline = time.monotonic() + 15
    while "ended-thread" not in rules(pymigrate):
        assert time.monotonic() < deadline
    done = pymigrate("checkpoint", "--image-path", tmp_path / "images", "--work-path", tmp_path, "c", check=False)
    assert "the first thread of a process has exited, and others run" in done.stderr


def test_a_session_of_exec(pymigrate: Local, bundle: Path) -> None:
    pymigrate("run", "-d", "-b", bundle, "c")
    null = subprocess.DEVNULL
    session = subprocess.Popen(
        [*PYMIGRATE, "--root", str(pymigrate.root), "exec", "c", "sh", "-c", "echo here; exec sleep 60"],
        stdin=null, stdout=subprocess.PIPE, stderr=null,
    )  # fmt: skip
    assert session.stdout is not None
    assert session.stdout.readline() == b"here\n"
    assert rules(pymigrate) == ["exec-session"]
    assert rules(pymigrate, "--allow", "exec-session") == []
    session.terminate()
    session.wait()
    assert rules(pymigrate) == []


def test_unknown_and_unliftable_rules_are_refused(pymigrate: Local, bundle: Path) -> None:
    pymigrate("run", "-d", "-b", bundle, "c")
    for rule, words in (("nonsense", "unknown rule"), ("device", "cannot be lifted")):
        done = pymigrate("validate", "c", "--allow", rule, check=False)
        assert (done.returncode, words in done.stderr) == (2, True)
