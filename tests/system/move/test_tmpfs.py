"""What lies in a tmpfs of a container, when it moves: too much of it to be packed while the container is frozen."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.files import mountinfo, tmpfs
from runtime.linux import syscalls
from tests.support.hosts import ABLE, COUNT, KILL_AGENT, driver
from tests.support.pybox import write_python_bundle
from tests.system.conftest import Lab

# On USR1 it stores to files without a trace in their times; on USR2 it says all that it sees.
PROGRAM = r"""
import hashlib, json, mmap, os, signal, socket, stat
D = "/tmp/d"
os.mkdir(D)
def make(name, data):
    with open(f"{D}/{name}", "wb") as file:
        file.write(data)
    return f"{D}/{name}"
big = make("big", os.urandom(9 << 20))
os.link(big, f"{D}/hard")
os.truncate(make("sparse", b"x"), 50 << 20)
os.symlink("/etc/passwd", f"{D}/link")
os.symlink("nowhere", f"{D}/dangling")
os.mkfifo(f"{D}/fifo")
bound = socket.socket(socket.AF_UNIX)
bound.bind(f"{D}/socket")
bound.listen()
os.setxattr(big, "trusted.x", b"\0value")
acl = "02000000 01000600ffffffff 02000400d2040000 04000400ffffffff 10000600ffffffff 20000400ffffffff"
os.setxattr(big, "system.posix_acl_access", bytes.fromhex(acl))
make("owned", b"o")
os.chown(f"{D}/owned", 77, 88)
os.chmod(f"{D}/owned", 0o4751)
make("#line\nof \udcff", b"n")
os.makedirs(f"{D}/deep/er")
make("deep/er/file", b"deep")
for path in (big, f"{D}/deep/er/file", f"{D}/deep/er"):
    os.utime(path, ns=(1, 978310923123456789))
ghost = open(make("ghost", b"nameless"), "r+b")
os.unlink(f"{D}/ghost")
remapped = open(make("remapped", b"another name"), "rb")
os.link(f"{D}/remapped", f"{D}/deep/other")
os.unlink(f"{D}/remapped")
quiet = make("quiet", bytes(8192))
both = os.open(make("both", bytes(8192)), os.O_RDWR)
mapped = mmap.mmap(os.open(make("mapped", bytes(8192)), os.O_RDWR), 8192)
os.chmod("/tmp", 0o1711)
os.chown("/tmp", 0, 99)
os.setxattr("/tmp", "trusted.root", b"r")

def store(fd):
    with mmap.mmap(fd, 8192) as memory:
        memory[100] += 1  # a page that is read first can be written to without a fault, which would change the times
count = 0
def stores(*_):
    global count
    count += 1
    with open(big, "r+b") as file:
        file.write(b"%d" % count)
    os.utime(big, ns=(1, 978310923123456789))
    fd = os.open(quiet, os.O_RDWR)
    store(fd)
    os.close(fd)
    store(both)
    mapped[100] += 1
    os.chmod("/tmp", 0o1711 + count)
    print("stored", flush=True)

def look(path):
    info = os.lstat(path)
    found = [path.encode(errors="surrogateescape").hex(), info.st_mode, info.st_uid, info.st_gid, info.st_nlink]
    if not stat.S_ISDIR(info.st_mode):
        found.append(info.st_size)
    if path not in ("/tmp", D, f"{D}/socket"):  # where CRIU makes names of its own
        found.append(info.st_mtime_ns)
    if stat.S_ISLNK(info.st_mode):
        return [*found, os.readlink(path)]
    found += [[name, os.getxattr(path, name).hex()] for name in sorted(os.listxattr(path))]
    if stat.S_ISREG(info.st_mode):
        with open(path, "rb") as file:
            found += [hashlib.sha256(file.read()).hexdigest(), info.st_blocks < 100 or path in (big, f"{D}/hard")]
    return found

def tells(*_):
    paths = ["/tmp"] + [os.path.join(at, name) for at, below, files in os.walk("/tmp") for name in below + files]
    mount = [line.split()[3:] for line in open("/proc/self/mountinfo") if line.split()[4] == "/tmp"]
    space = os.statvfs("/tmp")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{D}/socket")
        bound.accept()[0].close()
    print(json.dumps({
        "mount": mount, "space": [space.f_blocks, space.f_files], "files": [look(path) for path in sorted(paths)],
        "open": [os.pread(ghost.fileno(), 99, 0).decode(), os.pread(remapped.fileno(), 99, 0).decode()],
        "stored": [mapped[100], os.pread(both, 1, 100)[0]],
        "same": [os.path.sameopenfile(remapped.fileno(), os.open(f"{D}/deep/other", 0)),
                 os.path.sameopenfile(both, os.open(f"{D}/both", 0)), os.path.samefile(big, f"{D}/hard")],
    }), flush=True)
signal.signal(signal.SIGUSR1, stores)
signal.signal(signal.SIGUSR2, tells)
print("ready", flush=True)
while True:
    signal.pause()
"""
MOUNT = {
    "destination": "/tmp", "type": "tmpfs", "source": "shm",
    "options": ["nosuid", "noexec", "strictatime", "mode=1777", "size=16m", "nr_inodes=1234"],
}  # fmt: skip
ARM = "start-last-pass"
SAY = """
def say(name, lines):
    subprocess.run(["pymigrate", "kill", "web", name], check=True)
    while len(logs().splitlines()) < lines: time.sleep(0.01)
def logs():
    return subprocess.run(["pymigrate", "logs", "web"], check=True, capture_output=True, text=True).stdout
def end_agents():
    agents = "tr '\\\\0' ' ' < $p/cmdline 2>/dev/null | grep -q 'run/pymigrate/[a]gent' && kill ${p#/proc/}"
    script = "for p in /proc/[0-9]*; do " + agents + "; done; true"
    subprocess.run(["ssh", "host2", script], check=True, stdin=subprocess.DEVNULL)
"""


def lines(lab: Lab, host: str, count: int) -> list[str]:
    deadline = time.monotonic() + lab.patience
    while time.monotonic() < deadline:
        found = lab.on(host, "pymigrate", "logs", "web").stdout.splitlines()
        if len(found) >= count:
            return found
    raise AssertionError(found)


def told(lab: Lab, host: str, count: int) -> dict[str, Any]:
    """What the program sees now; its log has `count` lines then."""
    lab.on(host, "pymigrate", "kill", "web", "USR2")
    value: dict[str, Any] = json.loads(lines(lab, host, count)[count - 1])
    return value


def start(lab: Lab, program: str = PROGRAM) -> None:
    from runtime.spec.default import default_spec

    mounts = [MOUNT if entry["destination"] == "/tmp" else entry for entry in default_spec()["mounts"]]
    with tempfile.TemporaryDirectory() as directory:
        write_python_bundle(Path(directory, "web"), program, mounts=mounts)
        config = json.loads(Path(directory, "web/config.json").read_text())
        config["process"]["capabilities"] = ABLE
        Path(directory, "web/config.json").write_text(json.dumps(config))
        lab.put("host1", Path(directory, "web"), "/var/lib/pymigrate/test/web")
    lab.on("host1", "pymigrate", "run", "-d", "-b", "/var/lib/pymigrate/test/web", "web")
    lines(lab, "host1", 1)


def is_clean(lab: Lab, host: str) -> bool:
    return lab.sh(host, "grep /var/lib/pymigrate/ /proc/self/mountinfo; ls /var/lib/pymigrate/tmpfs", check=False) == ""


def move(lab: Lab, host: str, to: str, where: str = ARM, **steps: str) -> dict[str, Any]:
    """The last event of a move with something done on the way."""
    program = driver(where, body=SAY, **steps).replace('"host2"]))', f'"{to}"]))')
    done = lab.on(host, "python3", "-c", program, check=False)
    event: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert "Traceback" not in done.stderr, done.stderr
    return event


def test_all_in_a_tmpfs_comes_along_and_back(lab: Lab) -> None:
    """Also what was stored to mapped files after the first pass, which changes no times there."""
    start(lab)
    there = move(lab, "host1", "host2", before="say('USR1', 2); say('USR2', 3)")
    before = json.loads(lines(lab, "host2", 3)[2])
    assert there["workload"] == "TARGET", there
    assert {item["tree"] for item in there["passes"]} == {"rootfs", "tmpfs /tmp"}
    assert (before["mount"][0][:2], before["stored"]) == (["/", "/tmp"], [1, 1])
    assert told(lab, "host2", 4) == before
    group = lab.state("host2")["cgroup_paths"]
    usage = lab.sh("host2", f"cat {group.get('memory') or group['']}/memory.stat")
    counted = {line.split()[0]: int(line.split()[1]) for line in usage.splitlines()}
    assert counted["shmem"] > 9 << 20, "the container pays for it"
    assert is_clean(lab, "host2")
    back = move(lab, "host2", "host1", before="say('USR1', 5); say('USR2', 6)")
    before = json.loads(lines(lab, "host1", 6)[5])
    assert (back["workload"], before["stored"]) == ("TARGET", [2, 2])
    assert told(lab, "host1", 7) == before
    assert is_clean(lab, "host1")


def test_it_outlives_a_power_cut_of_the_target_in_doubt(lab: Lab) -> None:
    """Source and agent are gone when nobody has let it run yet: images and mounts are on the disk."""
    start(lab, PROGRAM.replace('os.unlink(f"{D}/ghost")', ""))  # CRIU, killed, would leave a name of its own
    before = told(lab, "host1", 2)
    body = f"""
def cut():
    subprocess.run(["ssh", "host2", {KILL_AGENT!r}], check=True, stdin=subprocess.DEVNULL)
    os.kill(os.getpid(), 9)
"""
    program = driver("end-source", after="cut()", body=body)
    assert lab.on("host1", "python3", "-c", program, check=False).returncode == 137
    deadline = time.monotonic() + lab.patience
    while [path for path in lab.images("host2") if "incoming/" not in path or path.endswith(".new")]:
        assert time.monotonic() < deadline
    assert lab.sh("host2", "ls /var/lib/pymigrate/incoming/*/pymigrate-tmpfs-0.img") != ""
    lab.sh("host2", "umount /var/lib/pymigrate/tmpfs/*/*; rm -r /var/lib/pymigrate/tmpfs /run/pymigrate/receiving")
    lab.on("host1", "pymigrate", "recover", "web")
    assert told(lab, "host2", 1) == before
    assert (is_clean(lab, "host2"), lab.images("host2")) == (True, [])


def test_files_of_a_small_one_keep_all_that_they_have(lab: Lab) -> None:
    """CRIU packs it: attributes, ACLs and times to the nanosecond come along as well."""
    start(lab, PROGRAM.replace("9 << 20", "1 << 20"))
    before = told(lab, "host1", 2)
    assert [item["tree"] for item in move(lab, "host1", "host2")["passes"]] == ["rootfs"]
    assert told(lab, "host2", 3) == before


# Which images are sent.
LOOK = """
def look():
    import json
    from migrate.source import switchover
    send = switchover.Switchover.send_images
    def sent(self, *args):
        with open("/run/names", "w") as file:
            json.dump(os.listdir(self._images), file)
        return send(self, *args)
    switchover.Switchover.send_images = sent
look()
"""
EMPTY = "/tmp /dev/shm /proc/acpi /sys/firmware"
LATE = f"trap 'mkdir /tmp/in; echo late > /tmp/in/file' USR1; {COUNT}"
WRITE = """
def write():
    import json, pathlib
    subprocess.run(["pymigrate", "kill", "web", "USR1"], check=True)
    with open("/run/opencontainer/containers/web/state.json") as file:
        there = pathlib.Path(f"/proc/{json.load(file)['pid']}/root/tmp/in/file")
    deadline = time.monotonic() + 60
    while not there.exists() or not there.stat().st_size:
        assert time.monotonic() < deadline
        time.sleep(0.01)
"""


def empty_mounts(lab: Lab, host: str) -> list[list[str]]:
    """The options, root and attributes of the mounts at EMPTY, in a host."""
    text = lab.on(host, "pymigrate", "exec", "web", "cat", "/proc/self/mountinfo").stdout
    lines = [line.split() for line in text.splitlines() if line.split()[4] in EMPTY.split()]
    seen = lab.on(host, "pymigrate", "exec", "web", "stat", "-c", "%a %u %g", *EMPTY.split()).stdout.splitlines()
    # The number of inodes is a default, which `narrow` says.
    options = [[o for o in line[-1].split(",") if not o.startswith("nr_inodes=")] for line in lines]
    return [sorted([line[4], line[5], line[3], *rest]) for line, rest in zip(lines, options, strict=True)] + [seen]


@pytest.mark.parametrize("late", [False, True], ids=["empty", "written-to-later"])
def test_empty_ones_and_masked_directories_do_not_go_with_the_images(lab: Lab, late: bool) -> None:
    lab.run(script=LATE)
    reached = lab.wait_count("host1", 1)
    before = empty_mounts(lab, "host1")
    assert len(before) == 5, before
    program = driver("start-last-pass", after="write()" if late else "pass", body=WRITE + LOOK)
    done = lab.on("host1", lab.python, "-c", program)
    images = json.loads(lab.sh("host1", "cat /run/names"))
    packed = [name for name in images if name.startswith("tmpfs-")]
    assert len(packed) <= 2, "more than /dev, and the directory of the hierarchies of cgroups of version 1"
    assert json.loads(done.stdout.splitlines()[-1])["workload"] == "TARGET"
    lab.wait_count("host2", reached)
    assert sorted(empty_mounts(lab, "host2")[:4]) == sorted(before[:4])
    assert empty_mounts(lab, "host2")[4] == before[4]
    assert lab.on("host2", "pymigrate", "exec", "web", "find", "/tmp", "-type", "f").stdout == (
        "/tmp/in/file\n" if late else ""
    )
    assert is_clean(lab, "host2")


def test_a_move_that_fails_leaves_a_tmpfs_as_it_was(lab: Lab) -> None:
    start(lab)
    before = told(lab, "host1", 2)
    failed = move(
        lab,
        "host1",
        "host2",
        "leaving",
        before="raise OSError('test')",
    )
    assert failed["workload"] == "SOURCE"
    assert told(lab, "host1", 3) == before
    assert is_clean(lab, "host2")


def test_a_tmpfs_outlives_the_agent(lab: Lab) -> None:
    """Committed: the container is restored over a new connection, with what the target had been sent."""
    start(lab)
    before = told(lab, "host1", 2)
    event = move(lab, "host1", "host2", "end-source", after="end_agents()")
    assert (event["event"], event["workload"]) == ("report", "TARGET"), event
    assert told(lab, "host2", 1) == before, "the log from before is lost with the agent"
    assert is_clean(lab, "host2")


def test_mounts_that_change_meanwhile_are_noticed(lab: Lab) -> None:
    start(lab)
    before = told(lab, "host1", 2)
    remount = "subprocess.run(['nsenter', '-m', '-t', str(pid), 'mount', '-o', 'remount,size=15m', '/tmp'], check=True)"
    event = move(
        lab, "host1", "host2",
        before=f"import json; pid = json.load(open('/run/opencontainer/containers/web/state.json'))['pid']; {remount}",
    )  # fmt: skip
    assert event["workload"] == "SOURCE"
    assert "the mounts of container web at /tmp have changed" in event["message"]
    after = told(lab, "host1", 3)
    assert after["files"] == before["files"]


@pytest.mark.parametrize(
    ("mount", "more"),
    [
        pytest.param({}, {"destination": "/tmp/below", "type": "tmpfs", "source": "tmpfs"}, id="one-lies-in-it"),
        pytest.param({"options": ["mode=1777", "rshared"]}, None, id="shared"),
    ],
)
def test_what_is_not_plain_goes_with_the_images(lab: Lab, mount: dict[str, Any], more: dict[str, Any] | None) -> None:
    from runtime.spec.default import default_spec

    mounts = [entry for entry in default_spec()["mounts"] if entry["destination"] != "/tmp"]
    mounts += [MOUNT | mount, *([more] if more else [])]
    fill = "yes | head -c 6m > /tmp/data; md5sum /tmp/data; trap 'md5sum /tmp/data' USR1; "
    lab.run(script=fill + "while :; do usleep 10000; done", mounts=mounts)
    digest = lines(lab, "host1", 1)
    event = json.loads(lab.on("host1", "pymigrate", "--json", "move", "web", "host2").stdout.splitlines()[-1])
    assert "tmpfs /tmp" not in [item["tree"] for item in event["passes"]]
    assert event["bytes_sent"] > 6 << 20, "nothing is compressed while it is frozen"
    lab.on("host2", "pymigrate", "kill", "web", "USR1")
    assert lines(lab, "host2", 2) == digest * 2


@pytest.fixture
def view() -> Iterator[tmpfs.View]:
    """Of a file system that this process alone has."""
    fd = syscalls.detached_tmpfs(mode=0o700)
    view = tmpfs.View(tmpfs.Mounted("/x", "", "tmpfs"), mountinfo.Mount("/", "/x", "tmpfs", "tmpfs"), fd)
    yield view
    view.close()


def test_what_was_closed_after_writing_is_noted(view: tmpfs.View) -> None:
    for name in ("seen", "read", "later"):
        Path(view.path, name).touch()
    inodes = {name: os.stat(f"{view.path}/{name}").st_ino for name in ("seen", "read", "later")}
    view.stored(os.getpid())
    Path(view.path, "read").read_bytes()
    Path(view.path, "seen").open("r+b").close()
    with Path(view.path, "later").open("r+b"), Path(view.path, "read").open("ab"):
        assert view.stored(os.getpid()) == {inodes["seen"], inodes["later"]}
    assert view.stored(os.getpid()) == {inodes["later"], inodes["read"]}
    assert not view.overflowed


def test_more_than_can_be_noted_is_noticed(view: tmpfs.View) -> None:
    limit = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
    for number in range(limit + 2):
        os.close(os.open(f"{view.path}/{number}", os.O_WRONLY | os.O_CREAT))
    view.stored(os.getpid())
    assert view.overflowed
