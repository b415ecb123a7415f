"""The attacks of runc's security advisories, each against the verbs that it could hit here.

Nothing is written where an attack must not get: a file is opened for writing and closed. Two are elsewhere:
CVE-2019-5736 (the runtime's own file is overwritten) in spec/test_interpreter.py, CVE-2023-25809 (cgroups of the host's
user are writable) in spec/test_rootless.py.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.attacks import attacked
from tests.support.boxes import Fields, make, output, refusal, wait_for
from tests.system.conftest import Local
from tests.system.spec.test_users import user_bundle

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


def test_no_bare_proc_in_a_user_namespace(pymigrate: Local, tmp_path: Path) -> None:
    """It must not unmount what it has inherited: that gets covered."""
    bundle = user_bundle(tmp_path / "b", BARE, ABLE)
    assert pymigrate("run", "--no-pivot", "-b", bundle, "c").stdout == "done\n"


def test_the_hosts_mounts_stay_at_the_host(pymigrate: Local, tmp_path: Path) -> None:
    """On a host like systemd's, where everything is shared: what is unmounted for the container stays mounted there."""
    bundle = make(tmp_path / "b", "cat /proc/self/mountinfo", {"linux.rootfsPropagation": "rshared"})
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
from runtime.init import program as container_program
container_program.require_labels = lambda *args: None
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


# As soon as /proc of the image is found, another container with the same root file system puts its own in the place.
SWAP = """
def _open(root, path, *args, _before=syscalls.open_in_root, **more):
    fd = _before(root, path, *args, **more)
    if path in ("{name}", "./{name}"):
        def act():
            if not os.path.exists("{rootfs}/moved"):
                os.rename("{rootfs}/{name}", "{rootfs}/moved")
                os.symlink("/fake", "{rootfs}/{name}")
        outside(act)
    return fd
syscalls.open_in_root = _open
"""
SHOW = "(: >> /moved/sys/kernel/core_pattern) && echo open; head -c 1 /moved/timer_list; echo done"


def test_covers_stay_on_the_proc_that_they_are_for(pymigrate: Local, tmp_path: Path) -> None:
    """CVE-2019-19921, CVE-2023-27561, CVE-2025-31133: masked and read-only paths covered a fake, not the kernel's."""
    bundle = make(tmp_path / "b", SHOW, {"process.capabilities": None})
    rootfs = bundle / "rootfs"
    (rootfs / "fake/sys/kernel").mkdir(parents=True)
    for name in ("timer_list", "sys/kernel/core_pattern"):
        (rootfs / "fake" / name).touch()
    done = attacked(pymigrate, SWAP.format(name="proc", rootfs=rootfs), "run", "-b", bundle, "c")
    assert (done.stdout, done.stderr.count("Read-only file system")) == ("done\n", 1), done


@pytest.mark.parametrize("link", ["proc/self", "/"])
def test_no_volume_gets_into_proc(pymigrate: Local, tmp_path: Path, link: str) -> None:
    """CVE-2019-16884, CVE-2023-28642: by a link in the image."""
    volume = {"destination": "/volume", "type": "bind", "source": "/usr", "options": ["bind"]}
    bundle = make(tmp_path / "b", "echo ran", {"mounts+": [volume]})
    (bundle / "rootfs/volume").symlink_to(link)
    done = pymigrate("run", "-b", bundle, "c", check=False)
    assert (done.stdout, "(/volume): leads " in done.stderr) == ("", True), done


# Of what is made for a mount point the first directory is replaced at once.
INTO_HOST = """
def _mkdir(path, *args, _before=os.mkdir, **more):
    _before(path, *args, **more)
    if path == "first":
        def act():
            os.rename("{volume}/first", "{volume}/moved")
            os.symlink("{outside}", "{volume}/first")
        outside(act)
os.mkdir = _mkdir
"""


@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_no_mount_point_is_made_on_the_host(pymigrate: Local, tmp_path: Path, kind: str) -> None:
    """CVE-2021-30465, CVE-2024-45310: nothing is made or mounted where a link on a volume leads at the host."""
    for directory in ("volume", "outside"):
        (tmp_path / directory).mkdir()
    (tmp_path / "file").write_text("x")
    mounts = [
        {"destination": "/volume", "type": "bind", "source": str(tmp_path / "volume"), "options": ["bind"]},
        {"destination": "/volume/first/second/last", "type": kind, "source": str(tmp_path / "file")},
    ]
    bundle = make(tmp_path / "b", "cat /proc/self/mountinfo", {"mounts+": mounts})
    attack = INTO_HOST.format(volume=tmp_path / "volume", outside=tmp_path / "outside")
    before = Path("/proc/self/mountinfo").read_text()
    done = attacked(pymigrate, attack, "run", "-b", bundle, "c", check=False)
    assert (tmp_path / "volume/moved").is_dir()
    assert os.listdir(tmp_path / "outside") == []
    assert Path("/proc/self/mountinfo").read_text() == before
    assert done.returncode or f" {tmp_path}/outside/second/last " in done.stdout  # inside, where the link leads there


# A node is replaced as soon as it is made.
NODE = """
def _mknod(path, *args, _before=os.mknod, **more):
    _before(path, *args, **more)
    if path == "node":
        def act():
            os.rename("{volume}/node", "{volume}/moved")
            os.symlink("{file}", "{volume}/node")
        outside(act)
os.mknod = _mknod
"""


def test_owner_and_mode_of_a_device_stay_at_the_device(pymigrate: Local, tmp_path: Path) -> None:
    """As CVE-2021-30465: a file of the host got them, where a link on a volume leads."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "file").touch(0o600)
    volume = {"destination": "/volume", "type": "bind", "source": str(tmp_path / "volume"), "options": ["bind"]}
    node = {"path": "/volume/node", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666, "uid": 5, "gid": 6}
    bundle = make(tmp_path / "b", "echo ran", {"mounts+": [volume], "linux.devices": [node]})
    attack = NODE.format(volume=tmp_path / "volume", file=tmp_path / "file")
    done = attacked(pymigrate, attack, "run", "-b", bundle, "c", check=False)
    there = (tmp_path / "file").stat()
    assert (oct(there.st_mode), there.st_uid, there.st_gid) == ("0o100600", 0, 0)
    assert (done.stdout, "linux.devices (/volume/node): " in done.stderr) == ("", True), done


def on_volume(tmp_path: Path, script: str, **fields: object) -> Path:
    """A bundle whose /dev is a volume, changed by `script` at createContainer, where a racing container could be."""
    (tmp_path / "dev").mkdir()
    hook = {"path": "/bin/sh", "args": ["sh", "-ec", f"cd {tmp_path}/dev; {script}"]}
    volume = {"destination": "/dev", "type": "bind", "source": str(tmp_path / "dev"), "options": ["bind", "dev"]}
    bundle = make(tmp_path / "b", "echo ran", {"hooks": {"createContainer": [hook]}, **fields})
    config = json.loads((bundle / "config.json").read_text())
    config["mounts"] = [volume if entry["destination"] == "/dev" else entry for entry in config["mounts"]]
    (bundle / "config.json").write_text(json.dumps(config))
    return bundle


@pytest.mark.parametrize("script", ["ln -sf /proc/version null", "rm null; mknod null b 1 3"])
def test_nothing_but_the_null_device_masks_a_file(pymigrate: Local, tmp_path: Path, script: str) -> None:
    """CVE-2025-31133: by a link as /dev/null another file of the kernel's was bound, writable, over a masked path."""
    done = pymigrate("run", "-b", on_volume(tmp_path, script), "c", check=False)
    assert (done.stdout, "/dev/null is not the null device" in done.stderr) == ("", True), done


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("rm -f console; ln -s /proc/version console", "/dev/console is a symbolic link"),
        ("umount ../b/rootfs/dev/pts; touch pts/ptmx", "/dev/pts/ptmx is not a pseudo terminal"),
        ("umount ../b/rootfs/dev/pts; rm -rf pts; ln -s /proc/self pts", "process.terminal: cannot be made"),
    ],
)  # fmt: skip
def test_nothing_but_the_terminal_becomes_the_console(
    pymigrate: Local, tmp_path: Path, script: str, words: str
) -> None:
    """CVE-2025-52565: /dev/pts/N, found by its path, was a link to a file of the kernel's."""
    done = pymigrate("run", "-b", on_volume(tmp_path, script, **{"process.terminal": True}), "c", check=False)
    assert (done.returncode != 0, words in done.stderr) == (True, True), done


# A directory of the host is left open by mistake.
LEAK = """
from runtime.init import container as container_init
def _close(keep, given, _before=container_init.close_all_but):
    _before(keep, given)
    os.dup2(os.open("/usr", os.O_PATH), 99, inheritable=False)
container_init.close_all_but = _close
"""


def test_a_directory_of_the_host_is_no_working_directory(pymigrate: Local, tmp_path: Path) -> None:
    """CVE-2024-21626, at create and at exec; and what is open in the program at all."""
    for cwd in ("/proc/self/fd/99", "/proc/self/fd/99/lib/.."):
        bundle = make(tmp_path / f"b{len(cwd)}", "ls", {"process.cwd": cwd})
        done = attacked(pymigrate, LEAK, "run", "-b", bundle, "c", check=False)
        assert (done.stdout, "process.cwd: " in done.stderr) == ("", True), done
    pymigrate("run", "-d", "-b", make(tmp_path / "b", "sleep 60"), "c")
    done = attacked(pymigrate, LEAK, "exec", "--cwd", "/proc/self/fd/99", "c", "ls", check=False)
    assert (done.stdout, "process.cwd: " in done.stderr) == ("", True), done
    assert attacked(pymigrate, LEAK, "exec", "c", "ls", "/proc/self/fd").stdout.split() == ["0", "1", "2", "3"]


def test_nothing_is_inheritable(pymigrate: Local, tmp_path: Path) -> None:
    """CVE-2022-24769, CVE-2022-29162: a program without capabilities could get them by executing a file."""
    script = "grep CapInh /proc/self/status; sleep 60"
    bundle = make(tmp_path / "b", script, {"process.noNewPrivileges": False})
    pymigrate("run", "-d", "-b", bundle, "c")
    said = pymigrate("exec", "--cap", "CAP_CHOWN", "c", "grep", "CapInh", "/proc/self/status", "/proc/1/status").stdout
    assert [line.split()[1] for line in said.splitlines()] == ["0" * 16] * 2


def test_sysctls_are_not_written_into_the_image(pymigrate: Local, tmp_path: Path) -> None:
    """CVE-2025-52881: they are free text, and were written below the container's /proc."""
    bundle = make(tmp_path / "b", "cat /mnt/sys/net/ipv4/ip_forward", {"linux.sysctl": {"net.ipv4.ip_forward": "1"}})
    config = json.loads((bundle / "config.json").read_text())
    config["mounts"][0]["destination"] = "/mnt"
    (bundle / "config.json").write_text(json.dumps(config))
    fake = bundle / "rootfs/proc/sys/net/ipv4"
    fake.mkdir(parents=True)
    (fake / "ip_forward").touch()
    assert pymigrate("run", "-b", bundle, "c").stdout == "1\n"
    assert (fake / "ip_forward").read_text() == ""


def test_a_long_path_is_no_other_field(pymigrate: Local, tmp_path: Path) -> None:
    """CVE-2021-43784: a length of more than 16 bits wrapped, and the rest was taken for other settings."""
    path = "/proc/self/ns/" + "x" * 70_000
    said = refusal(pymigrate, tmp_path, {"linux.namespaces+": [{"type": "time", "path": path}]})
    assert "File name too long" in said or "namespaces" in said
    assert len(said.splitlines()) == 1


def test_a_restored_container_is_covered_too(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "sleep 60", ABLE)
    pymigrate("run", "-d", "--no-pivot", "-b", bundle, "c")
    images = ["--image-path", tmp_path / "images", "--work-path", tmp_path / "work"]
    pymigrate("checkpoint", *images, "c")
    pymigrate("restore", "-d", "-b", bundle, *images, "c")
    assert pymigrate("exec", "c", "sh", "-c", BARE).stdout == "done\n"
    said = pymigrate("exec", "c", "sh", "-c", ": >> /proc/sys/kernel/core_pattern; : >> /proc/timer_list", check=False)
    assert said.stderr.count("Read-only file system") == 1
