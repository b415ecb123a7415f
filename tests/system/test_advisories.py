"""The attacks of runc's security advisories, each against the verbs that it could hit here.

Nothing is written where an attack must not get: a file is opened for writing and closed.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.system.attacks import attacked
from tests.system.boxes import Fields, make, output, wait_for
from tests.system.conftest import Local
from tests.system.test_spec_users import user_bundle

SETS = ("bounding", "effective", "permitted")
# What runc gives to nobody and docker to everybody: root of the container may make a user namespace with it.
ABLE: Fields = {"process.capabilities": {name: ["CAP_SETFCAP"] for name in SETS}}
# A proc and a sysfs without the covers of the container's own, if the kernel lets a user namespace mount them.
BARE = """
unshare -Urmpf sh -c '
  mount -t proc none /proc && { echo proc; : >> /proc/sys/kernel/core_pattern; } && echo open
  unshare -n sh -c "mount -t sysfs none /sys && echo sysfs"
' 2>/dev/null; echo done
"""


@pytest.mark.parametrize("flag", [(), ("--no-pivot",)], ids=["pivot", "no-pivot"])
def test_no_mount_of_the_host_lets_a_bare_proc_be_mounted(
    pymigrate: Local, tmp_path: Path, flag: tuple[str, ...]
) -> None:
    """A user namespace may mount proc where one without covers is mounted already, seen or not."""
    assert output(pymigrate, tmp_path, BARE, ABLE, *flag) == "done\n"


@pytest.mark.parametrize("flag", [(), ("--no-pivot",)], ids=["pivot", "no-pivot"])
def test_no_bare_proc_in_a_user_namespace(pymigrate: Local, tmp_path: Path, flag: tuple[str, ...]) -> None:
    bundle = user_bundle(tmp_path / "b", BARE, ABLE)
    assert pymigrate("run", "-b", bundle, *flag, "c").stdout == "done\n"


@pytest.mark.parametrize("propagation", ["rshared", "rslave", "rprivate"])
def test_the_hosts_mounts_stay_at_the_host(pymigrate: Local, tmp_path: Path, propagation: str) -> None:
    """On a host like systemd's, where everything is shared: what is unmounted for the container stays mounted there."""
    bundle = make(tmp_path / "b", "cat /proc/self/mountinfo", {"linux.rootfsPropagation": propagation})
    script = """
    set -e
    mount --bind "$1/b" "$1/b"
    mount --make-rshared /
    mkdir "$1/a b"; mount -t tmpfs over "$1/a b"; mkdir "$1/a b/sub"; mount -t proc sub "$1/a b/sub"
    cat /proc/self/mountinfo > "$1/before"
    shift; "$@"; cat /proc/self/mountinfo > "$0/after"
    """
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", script]
    run = pymigrate.argv("run", "--no-pivot", "-b", bundle, "c")
    done = subprocess.run([*command, tmp_path, tmp_path, *run], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "before").read_text() == (tmp_path / "after").read_text()
    assert str(tmp_path / "a") not in done.stdout


# As soon as a place on the volume is found, another container renames it, and puts a link to another mount there.
RENAME = """
def _hit(place):
    name = os.path.basename(place)
    if name in {names!r}.split():
        def act():
            if not os.path.islink("{volume}/" + name):
                os.rename("{volume}/" + name, "{volume}/moved-" + name)
                os.symlink("/tmp", "{volume}/" + name)
        outside(act)
def _open(root, path, *args, _before=syscalls.open_in_root, **more):
    fd = _before(root, path, *args, **more)
    _hit(path)
    return fd
def _mount(source, target, *args, _before=syscalls.mount):
    _before(source, target, *args)
    _hit(os.readlink(target) if target.startswith("/proc/self/fd/") else target)
syscalls.open_in_root, syscalls.mount = _open, _mount
"""


# A kernel before 5.12.
OLD = """
def _missing(*args, **more):
    raise OSError(38, "mount_setattr")
syscalls.mount_setattr = _missing
"""


@pytest.mark.parametrize("kernel", ["", OLD], ids=["new", "old"])
def test_a_mount_keeps_its_flags_while_its_place_is_renamed(pymigrate: Local, tmp_path: Path, kernel: str) -> None:
    """Issue 13, H: a read-only mount was writable at the place's new name."""
    names = "bind tree copied groups kept hidden"
    for directory in ("volume", "source"):
        (tmp_path / directory).mkdir()
    for name in names.split():
        (tmp_path / "volume" / name).mkdir()
        (tmp_path / "volume" / name / "inside").touch()
    source = str(tmp_path / "source")
    mounts = [
        {"destination": "/volume", "type": "bind", "source": str(tmp_path / "volume"), "options": ["bind"]},
        {"destination": "/volume/bind", "type": "bind", "source": source, "options": ["bind", "ro", "nodev"]},
        {
            "destination": "/volume/tree",
            "type": "bind",
            "source": source,
            "options": ["rbind", "ro" if kernel else "rro", "rslave"],
        },
        {"destination": "/volume/copied", "type": "tmpfs", "source": "x", "options": ["tmpcopyup", "ro"]},
        {"destination": "/volume/groups", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
    ]
    fields = {"mounts+": mounts, "linux.readonlyPaths": ["/volume/kept"], "linux.maskedPaths": ["/volume/hidden"]}
    script = f"for i in {names}; do touch /volume/moved-$i/new && echo $i; done; ls /volume/moved-hidden; ls /tmp"
    bundle = make(tmp_path / "b", script, fields)
    attack = RENAME.format(names=names, volume=tmp_path / "volume") + kernel
    done = attacked(pymigrate, attack, "run", "-b", bundle, "c")
    assert done.stderr.count("Read-only file system") == len(names.split()), done
    assert done.stdout == ""
    assert {f"moved-{name}" for name in names.split()} <= set(os.listdir(tmp_path / "volume"))
    assert os.listdir(tmp_path / "source") == []


FAKE = """
mkdir -p /mnt; mount -t proc none /mnt; mount -t tmpfs none /proc; mkdir -p /proc/self/attr/apparmor
ln -s self /proc/thread-self; touch /proc/self/attr/apparmor/exec
ln -s /mnt/self/comm /proc/self/attr/exec
echo ready > /state; sleep 60
"""


def test_a_label_is_not_written_into_a_proc_of_the_container(pymigrate: Local, tmp_path: Path) -> None:
    """CVE-2019-16884, CVE-2019-19921, CVE-2025-52881: into a file of the container, or another one of the kernel's."""
    able = {"process.capabilities": {name: ["CAP_SYS_ADMIN"] for name in SETS}}
    bundle = make(tmp_path / "b", FAKE, able)
    pymigrate("run", "-d", "-b", bundle, "c")
    wait_for(bundle / "rootfs/state")
    for flag, field in (("--apparmor", "apparmorProfile"), ("--process-label", "selinuxLabel")):
        # This kernel runs no such module, and says so where the label arrives.
        done = pymigrate("exec", flag, "label", "c", "echo", "ran", check=False)
        assert (done.stdout, f"process.{field}: cannot be set to" in done.stderr) == ("", True), done
    assert pymigrate("exec", "c", "cat", "/proc/self/attr/apparmor/exec").stdout == ""


NO_CHECK = """
from runtime import process
process.require_labels = lambda *args: None
"""


def test_a_label_is_not_written_into_a_proc_of_the_image(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "echo ran", {"process.apparmorProfile": "label"})
    config = json.loads((bundle / "config.json").read_text())
    config["mounts"] = [entry for entry in config["mounts"] if entry["destination"] != "/proc"]
    (bundle / "config.json").write_text(json.dumps(config))
    (bundle / "rootfs/proc/self/attr").mkdir(parents=True)
    (bundle / "rootfs/proc/self/attr/exec").touch()
    done = attacked(pymigrate, NO_CHECK, "run", "-b", bundle, "c", check=False)
    assert (done.stdout, "process.apparmorProfile: cannot be set to" in done.stderr) == ("", True), done
    assert (bundle / "rootfs/proc/self/attr/exec").read_text() == ""
