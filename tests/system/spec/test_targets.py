"""Images that want our mounts and devices somewhere else: nothing outside of the rootfs is made or mounted over."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.linux import syscalls
from tests.support.boxes import Fields, make, output, refusal, run
from tests.system.conftest import Local


class Outside:
    """A directory of the host that links in images point to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "dir").mkdir(parents=True)
        (path / "file").write_text("untouched")
        self._before = self.seen()

    def seen(self) -> list[tuple[str, int, str]]:
        found = []
        for place in sorted(self.path.rglob("*")):
            there = place.lstat()
            found.append((str(place), there.st_mode, place.read_text() if stat.S_ISREG(there.st_mode) else ""))
        return found

    def untouched(self) -> bool:
        return self.seen() == self._before


@pytest.fixture
def outside(tmp_path: Path) -> Outside:
    return Outside(tmp_path / "outside")


LINKS = {
    "absolute": "{outside}/dir", "file": "{outside}/file", "dangling": "{outside}/new/deep",
    "relative": "../../../../../../../../../../../../..{outside}/dir",
    "dangling-relative": "../../../../../../..{outside}/x",
    "inside": "/run/there",
}  # fmt: skip
TARGETS: dict[str, Fields] = {
    "tmpfs": {"type": "tmpfs", "source": "tmpfs"},
    "bind-directory": {"type": "bind", "source": "/usr", "options": ["bind"]},
    "bind-file": {"type": "bind", "source": "/etc/passwd", "options": ["bind"]},
    "cgroup": {"type": "cgroup", "source": "cgroup"},
    "copyup": {"type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]},
    "proc": {"type": "proc", "source": "proc"}, "sysfs": {"type": "sysfs", "source": "sysfs"},
}  # fmt: skip


@pytest.mark.parametrize("kind", TARGETS)
def test_links_as_targets(pymigrate: Local, tmp_path: Path, outside: Outside, kind: str) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    for below in ("", "/below"):
        mounts = [{"destination": f"/to-{name}{below}", **TARGETS[kind]} for name in LINKS]
        bundle = make(tmp_path / f"b{below.strip('/')}", "cat /proc/self/mountinfo", {"mounts+": mounts})
        for name, link in LINKS.items():
            (bundle / f"rootfs/to-{name}").symlink_to(link.format(outside=outside.path))
        done = pymigrate("run", "-b", bundle, "c", check=False)
        if kind in ("proc", "sysfs"):
            assert (done.returncode, "symbolic link" in done.stderr) == (1, True)
        else:  # links are followed, but inside of the rootfs
            assert (done.returncode, done.stderr) == (0, "")
            places = [line.split()[4] for line in done.stdout.splitlines()]
            expected = {f"{outside.path}/{name}{below}" for name in ("dir", "file", "new/deep", "x")}
            assert expected | {f"/run/there{below}"} <= set(places)
        assert outside.untouched()
    assert Path("/proc/self/mountinfo").read_text() == before


@pytest.mark.parametrize("kind", ["tmpfs", "bind-file"])
def test_links_without_end(pymigrate: Local, tmp_path: Path, kind: str) -> None:
    for number, (name, link) in enumerate((("target", "target"), ("x", "target/x"))):
        bundle = make(tmp_path / f"b{number}", "true", {"mounts+": [{"destination": "/target", **TARGETS[kind]}]})
        (bundle / "rootfs/target").symlink_to(link)
        (bundle / "rootfs" / name).exists()
        done = pymigrate("run", "-b", bundle, "c", check=False)
        assert (done.returncode, "(/target)" in done.stderr) == (1, True), done
        assert "symbolic links" in done.stderr


@pytest.mark.parametrize("path", ["/proc", "/sys", "/proc/sys"])
def test_proc_and_sys_stand_where_they_are_said_to(
    pymigrate: Local, tmp_path: Path, outside: Outside, path: str
) -> None:
    bundle = make(tmp_path / "b", "echo ran")
    place = bundle / "rootfs" / path.split("/")[1]
    place.rmdir()
    place.symlink_to(outside.path / "dir")
    done = pymigrate("run", "-b", bundle, "c", check=False)
    assert (done.returncode, done.stdout, "is a symbolic link" in done.stderr) == (1, "", True)
    assert outside.untouched()


@pytest.mark.parametrize("name", ["console", "null", "pts", "ptmx", "fd"])
@pytest.mark.parametrize("what", ["link", "dangling", "file"])
def test_dev_of_the_image(pymigrate: Local, tmp_path: Path, outside: Outside, name: str, what: str) -> None:
    """Without a tmpfs on /dev what the image has there counts; it is used, replaced inside or refused."""
    bundle = make(tmp_path / "b", "echo ran")
    config = json.loads((bundle / "config.json").read_text())
    config["mounts"] = [entry for entry in config["mounts"] if entry["destination"] != "/dev"]
    (bundle / "config.json").write_text(json.dumps(config))
    place = bundle / "rootfs/dev" / name
    if what == "file":
        place.write_text("plain")
    else:
        place.symlink_to(outside.path / ("file" if what == "link" else "new"))
    done = pymigrate("run", "-b", bundle, "c", check=False)
    assert (done.returncode == 0) == (done.stdout == "ran\n")
    assert done.returncode == 0 or f"/dev/{name}" in done.stderr, done
    assert outside.untouched()


def test_no_log_in_the_image_is_written_through(pymigrate: Local, tmp_path: Path, outside: Outside) -> None:
    """A detached container's stdin is its own /dev/null, not what the image calls so."""
    bundle = make(tmp_path / "b", "cat; echo x > /dev/null; echo ran; sleep 60")
    config = json.loads((bundle / "config.json").read_text())
    config["mounts"] = [entry for entry in config["mounts"] if not entry["destination"].startswith("/dev")]
    (bundle / "config.json").write_text(json.dumps(config))
    (bundle / "rootfs/dev/null").symlink_to(outside.path / "file")
    done = pymigrate("run", "-d", "-b", bundle, "c", check=False)
    assert (done.returncode, "linux.devices (/dev/null)" in done.stderr) == (1, True)
    assert outside.untouched()


def test_devices(pymigrate: Local, tmp_path: Path) -> None:
    devices: list[dict[str, Any]] = [
        {"path": "/dev/chr", "type": "c", "major": 1, "minor": 3, "fileMode": 0o020640, "uid": 3, "gid": 4},
        {"path": "/dev/sub/blk", "type": "b", "major": 7, "minor": 9, "fileMode": 0o100600},
        {"path": "/dev/pipe", "type": "p", "fileMode": 0o622},
        {"path": "/dev/plain", "type": "u", "major": 1, "minor": 5},
    ]
    script = "for f in chr sub/blk pipe plain null tty; do stat -c '%n %F %t:%T %a %u:%g' /dev/$f; done; " \
             "for f in fd stdout ptmx; do readlink /dev/$f; done; umask"  # fmt: skip
    said = output(pymigrate, tmp_path, script, {"linux.devices": devices}, preexec_fn=lambda: os.umask(0o77) and None)
    assert said.splitlines() == [
        "/dev/chr character special file 1:3 640 3:4", "/dev/sub/blk block special file 7:9 600 0:0",
        "/dev/pipe fifo 0:0 622 0:0", "/dev/plain character special file 1:5 666 0:0",
        "/dev/null character special file 1:3 666 0:0", "/dev/tty character special file 5:0 666 0:0",
        "/proc/self/fd", "/proc/self/fd/1", "pts/ptmx", "0077",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "readable"),
    [
        (None, ["zero"]),
        ([], ["zero"]),
        ([{"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rwm"}], ["zero"]),
        ([{"allow": False, "type": "c", "major": 1, "minor": 5, "access": "rwm"}], ["zero"]),
        ([{"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"}], ["zero", "kmsg"]),
        ([{"allow": True}], ["zero", "kmsg"]),
    ],
)  # fmt: skip
def test_only_what_rules_allow_can_be_opened(
    pymigrate: Local, tmp_path: Path, rules: list[dict[str, Any]] | None, readable: list[str]
) -> None:
    """Without rules, and where they do not begin with one for all devices, everything else is denied, as by runc."""
    node = {"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11}
    script = "for f in zero kmsg; do dd if=/dev/$f of=/dev/null bs=9000 count=1 2>/dev/null && echo $f; done; true"
    fields: Fields = {"linux.devices": [node], "linux.resources": None if rules is None else {"devices": rules}}
    fields["process.capabilities"] = {key: ["CAP_SYSLOG"] for key in ("bounding", "effective", "permitted")}
    said = output(pymigrate, tmp_path, script, fields)
    assert said.split() == readable


def test_device_in_the_place_of_something_else(pymigrate: Local, tmp_path: Path) -> None:
    device = {"path": "/etc/passwd", "type": "c", "major": 1, "minor": 3}
    assert "linux.devices (/etc/passwd): " in refusal(pymigrate, tmp_path, {"linux.devices": [device]})
    device = {"path": "/dev/null", "type": "c", "major": 1, "minor": 3}  # what is there already
    assert run(pymigrate, tmp_path, "true", {"linux.devices": [device]}).returncode == 0


def test_umask_of_the_caller_does_not_matter(pymigrate: Local, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    mount = {"destination": "/new/place/file", "type": "bind", "source": str(tmp_path / "f"), "options": ["bind"]}
    said = output(pymigrate, tmp_path, "stat -c %a /new /new/place", {"mounts+": [mount]},
                  preexec_fn=lambda: os.umask(0o77) and None)  # fmt: skip
    assert said.split() == ["755", "755"]


def test_a_target_is_found_while_others_rename(tmp_path: Path) -> None:
    """openat2 gives up at a ".." then, which failed a `run` now and then."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    program = "import os\nwhile True: os.rename('b', 'c'); os.rename('c', 'b')"
    renaming = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path / "a")
    root = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        for _ in range(5000):
            os.close(syscalls.open_in_root(root, "a/../a/../a", os.O_PATH))
    finally:
        os.close(root)
        renaming.kill()
        renaming.wait()
