"""Containers of a user without privileges."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.boxes import PATIENCE, wait_for
from tests.support.hosts import ROOTFS
from tests.system.spec.test_interpreter import HOLD, WATCH, end, give_python

USER = 20123  # nobody's on this machine
SUB = 300000


class Rootless:
    """pymigrate as another user, in a mount namespace of the test's in which that user has subordinate ids."""

    def __init__(self, home: Path) -> None:
        self.home = home
        base = Path(__file__).parents[3]
        self._holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", f"mount --bind {home}/subid /etc/subuid; "
             f"mount --bind {home}/subid /etc/subgid; mount --bind {home}/passwd /etc/passwd; echo; read x"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._holder.stdout is not None
        self._holder.stdout.readline()
        self._prefix = ["nsenter", "-t", str(self._holder.pid), "-m", "setpriv", "--reuid", str(USER),
                        "--regid", str(USER), "--clear-groups", "env", "-i", f"PATH={os.environ['PATH']}",
                        f"PYTHONPATH={base}", f"HOME={home}", "PYTHONDONTWRITEBYTECODE=1"]  # fmt: skip

    def close(self) -> None:
        self._holder.communicate("\n", timeout=PATIENCE)

    def run(self, *argv: object, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [*self._prefix, *map(str, argv)], capture_output=True, text=True, cwd=self.home, timeout=60,
            **{"stdin": subprocess.DEVNULL, **options},
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done

    def __call__(self, *argv: object, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "migrate.cli", "--root", str(self.home / "state"), *argv]
        return self.run(*command, check=check, **options)

    def own_python(self) -> Path:
        """A copy of the interpreter that belongs to the user, and so to root of its containers."""
        copy = self.home / "python3"
        shutil.copy2(os.path.realpath(sys.executable), copy)
        os.chown(copy, USER, USER)
        return copy

    def bundle(self, name: str, script: str, **linux: Any) -> Path:
        place = self.home / name
        place.mkdir()
        shutil.copytree(ROOTFS, place / "rootfs", symlinks=True)
        subprocess.run(["chown", "-Rh", f"{USER}:{USER}", place], check=True)
        self("spec", "--rootless", "-b", place)
        config = json.loads((place / "config.json").read_text())
        config["process"]["args"] = ["sh", "-c", script]
        config["root"]["readonly"] = False
        config["linux"] |= linux
        (place / "config.json").write_text(json.dumps(config))
        return place


@pytest.fixture
def rootless() -> Iterator[Rootless]:
    # Not below pytest's directory, which is root's alone.
    home = Path("/tmp", f"pymigrate-rootless-{os.getpid()}")
    home.mkdir()
    (home / "subid").write_text(f"tester:{SUB}:65536\n")
    (home / "passwd").write_text(Path("/etc/passwd").read_text() + f"tester:x:{USER}:{USER}::{home}:/bin/sh\n")
    os.chown(home, USER, USER)
    user = Rootless(home)
    yield user
    for container in json.loads(user("list", "--format", "json", check=False).stdout or "[]") or []:
        user("delete", "--force", container["id"], check=False)
    user.close()
    shutil.rmtree(home)


def test_whole_life(rootless: Rootless) -> None:
    script = "id -u; cat /proc/self/uid_map; touch /made; hostname; echo up; while :; do sleep 0.05; done"
    bundle = rootless.bundle("b", script)
    rootless("create", "-b", bundle, "c")
    shown = json.loads(rootless("state", "c").stdout)
    assert (shown["status"], shown["owner"]) == ("created", "tester")
    rootless("start", "c")
    done = rootless("exec", "c", "sh", "-c", "id -u; ls / | wc -l; exit 4", check=False)
    assert (done.returncode, done.stdout.split()[0]) == (4, "0")
    while "up\n" not in rootless("logs", "c").stdout:
        pass
    said = rootless("logs", "c").stdout.split()
    assert said == ["0", "0", str(USER), "1", "pymigrate", "up"]
    assert (bundle / "rootfs/made").stat().st_uid == USER
    rootless("kill", "c", "KILL")
    while json.loads(rootless("state", "c").stdout)["status"] != "stopped":
        pass
    rootless("delete", "c")
    assert json.loads(rootless("list", "--format", "json").stdout or "null") in (None, [])


def test_foreground_and_exit_status(rootless: Rootless) -> None:
    done = rootless("run", "-b", rootless.bundle("b", "cat; exit 3"), "c", check=False, input="in\n", stdin=None)
    assert (done.returncode, done.stdout) == (3, "in\n"), done.stderr


def test_terminal(rootless: Rootless) -> None:
    bundle = rootless.bundle("b", "tty")
    config = json.loads((bundle / "config.json").read_text())
    config["process"]["terminal"] = True
    (bundle / "config.json").write_text(json.dumps(config))
    assert rootless("run", "-b", bundle, "c").stdout == "/dev/pts/0\n"


def test_subordinate_ids(rootless: Rootless) -> None:
    if shutil.which("newuidmap") is None:
        pytest.skip("package uidmap is not installed")
    maps = [{"containerID": 0, "hostID": USER, "size": 1}, {"containerID": 1, "hostID": SUB, "size": 1000}]
    bundle = rootless.bundle(
        "b", "touch /a; chown 5:6 /a; id -G; cat /proc/self/setgroups", uidMappings=maps, gidMappings=maps
    )
    config = json.loads((bundle / "config.json").read_text())
    config["process"]["user"]["additionalGids"] = [7]
    for names in config["process"]["capabilities"].values():
        names.append("CAP_CHOWN")
    (bundle / "config.json").write_text(json.dumps(config))
    assert rootless("run", "-b", bundle, "c").stdout == "0 7\nallow\n"
    there = (bundle / "rootfs/a").stat()
    assert (there.st_uid, there.st_gid) == (SUB + 4, SUB + 5)


def test_ids_that_are_not_the_users(rootless: Rootless) -> None:
    maps = [{"containerID": 0, "hostID": USER, "size": 1}, {"containerID": 1, "hostID": SUB + 65000, "size": 1000}]
    bundle = rootless.bundle("b", "true", uidMappings=maps, gidMappings=maps)
    done = rootless("run", "-b", bundle, "c", check=False)
    assert (done.returncode, "linux.uidMappings: " in done.stderr) == (1, True), done


def test_what_it_may_not_do_is_said(rootless: Rootless) -> None:
    for number, (field, value, words) in enumerate((
        ("uidMappings", [{"containerID": 0, "hostID": 0, "size": 1}], "linux.uidMappings: "),
        ("namespaces", [{"type": "mount"}, {"type": "pid"}], "linux.namespaces: cannot make"),
        ("resources", {"memory": {"limit": 1 << 26}}, "cgroup"),
        ("devices", [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3}], "linux.devices (/dev/x): "),
    )):  # fmt: skip
        more: dict[str, Any] = {"uidMappings": [], "gidMappings": []} if field == "namespaces" else {}
        done = rootless(
            "run", "-b", rootless.bundle(f"b{number}", "echo ran", **{field: value, **more}), "c", check=False
        )
        assert (done.returncode != 0, done.stdout, words in done.stderr) == (True, "", True), done


def test_interpreter_of_the_user_is_safe(rootless: Rootless) -> None:
    """Root of the container owns the file: only a copy that is sealed keeps it from being overwritten."""
    bundle = rootless.bundle("b", WATCH)
    (bundle / "rootfs/hold").write_text(HOLD)
    give_python(bundle / "rootfs")
    python = rootless.own_python()
    before = python.read_bytes()
    command = [python, "-m", "migrate.cli", "--root", rootless.home / "state"]
    rootless.run(*command, "run", "-d", "-b", bundle, "c")
    wait_for(bundle / "rootfs/state")
    end(json.loads((rootless.home / "state/c/state.json").read_text())["monitor_pid"])
    for _ in range(4):
        rootless.run(*command, "exec", "c", "/proc/self/exe", "-c", "import time; time.sleep(0.1)")
    (bundle / "rootfs/stop").touch()
    rootless.run(*command, "delete", "-f", "c")
    assert (bundle / "rootfs/seen").exists()
    assert not (bundle / "rootfs/wrote").exists()
    assert python.read_bytes() == before


def test_groups_cannot_be_given_with_a_single_id(rootless: Rootless) -> None:
    bundle = rootless.bundle("b", "true")
    config = json.loads((bundle / "config.json").read_text())
    config["process"]["user"]["additionalGids"] = [5]
    (bundle / "config.json").write_text(json.dumps(config))
    done = rootless("run", "-b", bundle, "c", check=False)
    assert (done.returncode, "process.user.additionalGids: cannot be set" in done.stderr) == (1, True), done


def test_cgroups_of_the_host_are_read_only(rootless: Rootless) -> None:
    """CVE-2023-25809: what was mounted below the host's /sys was not, and the user has cgroups of their own there."""
    said = rootless("run", "-b", rootless.bundle("b", "cat /proc/self/mountinfo"), "c").stdout
    below = [line.split()[5] for line in said.splitlines() if line.split()[4].startswith("/sys")]
    assert len(below) > 1
    assert {options.split(",")[0] for options in below} == {"ro"}
