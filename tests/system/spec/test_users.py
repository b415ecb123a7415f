"""User namespaces, and mounts with ids mapped."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.boxes import Fields, make, refusal
from tests.system.conftest import Local
from tests.system.spec.test_namespaces import MAP, USER

TREE_MAP = [{"containerID": 0, "hostID": 100000, "size": 1000}]


def user_bundle(bundle: Path, script: str, fields: Fields | None = None) -> Path:
    """A bundle with the user namespace 0 -> 100000, whose root file system belongs to it."""
    make(bundle, script, {**USER, "linux.namespaces+": [{"type": "user"}], **(fields or {})})
    subprocess.run(["chown", "-Rh", "100000:100000", bundle / "rootfs"], check=True)
    return bundle


def test_root_inside_is_another_outside(pymigrate: Local, tmp_path: Path) -> None:
    script = "id -u; cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups; touch /made /dev/shm/x; " \
             "hostname; echo x > /dev/null; head -c 3 /dev/zero | wc -c"  # fmt: skip
    bundle = user_bundle(tmp_path / "b", script, {"process.noNewPrivileges": True})
    said = pymigrate("run", "-b", bundle, "c").stdout.splitlines()
    assert said[0] == "0"
    assert [line.split() for line in said[1:3]] == [["0", "100000", "65536"]] * 2
    assert said[3:6] == ["allow", "pymigrate", "3"]
    there = (bundle / "rootfs/made").stat()
    assert (there.st_uid, there.st_gid) == (100000, 100000)


def test_life_in_a_user_namespace(pymigrate: Local, tmp_path: Path) -> None:
    bundle = user_bundle(tmp_path / "b", "sleep 60")
    pymigrate("create", "-b", bundle, "c")
    pid = pymigrate.state("c")["pid"]
    pymigrate("start", "c")
    assert Path(f"/proc/{pid}").stat().st_uid == 100000
    said = pymigrate(
        "exec", "-u", "5:6", "-g", "7", "c", "sh", "-c", "id -u; id -G; touch /tmp/x; grep CapBnd /proc/self/status"
    )
    assert said.stdout.split()[:3] == ["5", "6", "7"]
    pymigrate("kill", "c", "KILL")
    pymigrate("delete", "-f", "c")


def test_several_mappings(pymigrate: Local, tmp_path: Path) -> None:
    maps = [{"containerID": 0, "hostID": 0, "size": 1}, {"containerID": 1, "hostID": 200000, "size": 10},
            {"containerID": 500, "hostID": 300000, "size": 1}]  # fmt: skip
    fields = {"linux.uidMappings": maps, "linux.gidMappings": maps, "linux.namespaces+": [{"type": "user"}],
              "process.user": {"uid": 500, "gid": 3, "additionalGids": [500]}}  # fmt: skip
    bundle = make(tmp_path / "b", "id -u; id -G; cat /proc/self/uid_map; touch /w/x", fields)
    (bundle / "rootfs/w").mkdir(mode=0o777)
    (bundle / "rootfs/w").chmod(0o777)
    said = pymigrate("run", "-b", bundle, "c").stdout.split()
    assert said == ["500", "3", "500", "0", "0", "1", "1", "200000", "10", "500", "300000", "1"]
    there = (bundle / "rootfs/w/x").stat()
    assert (there.st_uid, there.st_gid) == (300000, 200002)


def test_setup_in_a_user_namespace(pymigrate: Local, tmp_path: Path) -> None:
    fields = {
        "linux.sysctl": {"net.ipv4.ip_forward": "1", "kernel.shmmax": "4097"}, "root.readonly": True,
        "process.rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}], "process.oomScoreAdj": 3,
        "process.scheduler": {"policy": "SCHED_BATCH", "nice": -2},
        "linux.namespaces+": [{"type": "user"}, {"type": "time"}],
        "linux.timeOffsets": {"boottime": {"secs": 10**6}},
    }  # fmt: skip
    script = "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmax /proc/self/oom_score_adj; ulimit -n; " \
             "cut -d. -f1 /proc/uptime; touch /x; sed -n 's/^policy *: *//p' /proc/1/sched"  # fmt: skip
    done = pymigrate("run", "-b", user_bundle(tmp_path / "b", script, fields), "c")
    values = done.stdout.split()
    assert values[:4] + values[5:] == ["1", "4097", "3", "77", "3"]
    assert int(values[4]) > 10**6
    assert "Read-only" in done.stderr


def test_bind_mounts_reach_what_its_root_could_not(pymigrate: Local, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "d").mkdir(mode=0o755)
    (hidden / "d/x").write_text("here\n")
    hidden.chmod(0o700)
    mounts = [
        {"destination": "/mnt", "type": "bind", "source": str(hidden / "d"), "options": ["rbind", "ro", "nosuid"]}
    ]
    done = pymigrate(
        "run", "-b", user_bundle(tmp_path / "b", "cat /mnt/x; touch /mnt/y", {"mounts+": mounts}), "c", check=False
    )
    assert (done.stdout, "Read-only" in done.stderr) == ("here\n", True)


def test_devices_are_the_hosts(pymigrate: Local, tmp_path: Path) -> None:
    null = {"path": "/dev/null", "type": "c", "major": 1, "minor": 3}
    assert (
        pymigrate("run", "-b", user_bundle(tmp_path / "b", "echo > /dev/null", {"linux.devices": [null]}), "c").stderr
        == ""
    )
    for device, words in (
        ({**null, "minor": 5}, "and it differs"),
        ({**null, "path": "/dev/none"}, "No such file"),
    ):
        done = pymigrate(
            "run", "-b", user_bundle(tmp_path / f"b{words[:2]}", "true", {"linux.devices": [device]}), "c", check=False
        )
        assert f"linux.devices ({device['path']}): " in done.stderr
        assert words in done.stderr


def test_what_a_fork_does_not_inherit_is_refused(pymigrate: Local, tmp_path: Path) -> None:
    scheduler = {"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_RESET_ON_FORK"]}
    done = pymigrate(
        "run", "-b", user_bundle(tmp_path / "b", "true", {"process.scheduler": scheduler}), "c", check=False
    )
    assert "process.scheduler: " in done.stderr


def test_seccomp_terminal_and_hooks_in_a_user_namespace(pymigrate: Local, tmp_path: Path) -> None:
    hook = [{"path": "/bin/sh", "args": ["sh", "-c", f"id -u >> {tmp_path}/ids"]}]
    inner = [{"path": "/bin/sh", "args": ["sh", "-c", "id -u > /hooked"]}]
    fields = {
        "process.terminal": True, "hooks": {"createRuntime": hook, "startContainer": inner},
        "linux.seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]},
    }  # fmt: skip
    bundle = user_bundle(tmp_path / "b", "tty; mkdir /x; cat /hooked; ls -l /dev/console | cut -c1", fields)
    said = pymigrate("run", "-b", bundle, "c", check=False).stdout.replace("\r", "").splitlines()
    assert said == ["/dev/pts/0", "mkdir: can't create directory '/x': Operation not permitted", "0", "c"]
    assert (tmp_path / "ids").read_text() == "0\n"


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    base = tmp_path / "tree"
    (base / "sub").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "sub", base / "sub"], check=True)
    for place in (base, base / "sub"):
        (place / "file").touch()
        os.chown(place / "file", 7, 8)
    yield base
    subprocess.run(["umount", base / "sub"], check=True)


@pytest.mark.parametrize(("option", "below"), [("idmap", "7:8"), ("ridmap", "100007:100008")])
def test_mappings_of_a_mount(pymigrate: Local, tmp_path: Path, tree: Path, option: str, below: str) -> None:
    mount = {"destination": "/mnt", "type": "bind", "source": str(tree), "options": ["rbind", option],
             "uidMappings": TREE_MAP, "gidMappings": TREE_MAP}  # fmt: skip
    bundle = make(tmp_path / "b", "stat -c %u:%g /mnt/file /mnt/sub/file", {"mounts+": [mount]})
    assert pymigrate("run", "-b", bundle, "c").stdout.split() == ["100007:100008", below]


def test_mappings_of_a_mount_are_those_of_the_container(pymigrate: Local, tmp_path: Path, tree: Path) -> None:
    mount = {"destination": "/mnt", "type": "bind", "source": str(tree), "options": ["rbind", "ridmap"]}
    script = "stat -c %u:%g /mnt/file /mnt/sub/file; touch /mnt/new"
    (tree).chmod(0o777)
    assert (
        pymigrate("run", "-b", user_bundle(tmp_path / "b", script, {"mounts+": [mount]}), "c").stdout.split()
        == ["7:8"] * 2
    )
    assert (tree / "new").stat().st_uid == 0


def test_mappings_that_make_no_sense(pymigrate: Local, tmp_path: Path, tree: Path) -> None:
    bind = {"destination": "/mnt", "type": "bind", "source": str(tree), "options": ["rbind", "idmap"]}
    assert "mounts[8].options: idmap needs mappings" in refusal(pymigrate, tmp_path, {"mounts+": [bind]})
    one = {**bind, "uidMappings": TREE_MAP}
    assert "mounts[8].gidMappings: is missing" in refusal(pymigrate, tmp_path, {"mounts+": [one]})
    proc = {**one, "gidMappings": TREE_MAP, "source": "/proc"}
    assert "mounts[8] (/mnt): /proc: ids cannot be mapped on this mount" in refusal(
        pymigrate, tmp_path, {"mounts+": [proc]}
    )
    twice = [*MAP, {"containerID": 5, "hostID": 5, "size": 5}]
    fields = {"linux.uidMappings": twice, "linux.gidMappings": twice, "linux.namespaces+": [{"type": "user"}]}
    assert "linux.uidMappings: " in refusal(pymigrate, tmp_path, fields)
