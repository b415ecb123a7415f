"""linux.namespaces: none, new and joined ones, and what is set in them."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.boxes import Fields, make, namespaces, output, refusal, run, running, wait_for
from tests.system.conftest import Local

FILES = {"uts": "uts", "ipc": "ipc", "network": "net", "cgroup": "cgroup", "time": "time", "pid": "pid", "user": "user"}
# What needs a namespace of its own is left out, so that each can be left out.
BARE: Fields = {
    "hostname": None, "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}, {
        "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}],
    "linux.maskedPaths": [], "linux.readonlyPaths": [],
}  # fmt: skip
MAP = [{"containerID": 0, "hostID": 100000, "size": 65536}]
USER: Fields = {"linux.uidMappings": MAP, "linux.gidMappings": MAP}


def link(kind: str, pid: int | str = "self") -> str:
    return os.readlink(f"/proc/{pid}/ns/{FILES[kind]}")


@pytest.fixture
def other() -> Iterator[int]:
    """The pid of a process in new namespaces of all types, with a user namespace that owns the others."""
    inner = "exec unshare -nuipCTm --fork sh -c 'hostname joined; echo; read x'"
    script = f'echo; read x; exec setpriv --reuid 0 --regid 0 --clear-groups sh -c "{inner}"'
    with running(
        "unshare", "-U", "--keep-caps", "sh", "-c", script, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{name}").write_text("0 100000 65536\n")
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        yield int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "user"])
def test_absent_and_new(pymigrate: Local, tmp_path: Path, kind: str) -> None:
    ask = f"readlink /proc/self/ns/{FILES[kind]}"
    others = [name for name in FILES if name not in (kind, "user")]
    assert output(pymigrate, tmp_path, ask, {**BARE, "linux.namespaces": namespaces(*others)}).strip() == link(kind)
    assert output(pymigrate, tmp_path, ask, {**BARE, "linux.namespaces": namespaces(kind)}).strip() != link(kind)


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "user"])
def test_joined(pymigrate: Local, tmp_path: Path, other: int, kind: str) -> None:
    path = f"/proc/{other}/ns/{FILES[kind]}"
    spaces = namespaces(*(["pid"] if kind != "pid" else []), **{kind: path})
    said = output(pymigrate, tmp_path, f"readlink /proc/self/ns/{FILES[kind]}; hostname",
                  {**BARE, "linux.namespaces": spaces}).split()  # fmt: skip
    assert said[0] == link(kind, other)
    assert (said[1] == "joined") == (kind == "uts")


def test_all_joined_with_the_user_namespace_that_owns_them(pymigrate: Local, tmp_path: Path, other: int) -> None:
    paths = {kind: f"/proc/{other}/ns/{name}" for kind, name in FILES.items()}
    # With the pid namespace, somebody inside could trace the init while it still has the host's files.
    both = refusal(pymigrate, tmp_path, {**BARE, "linux.namespaces": namespaces(**paths)})
    assert "linux.namespaces: joining a pid namespace together with a user namespace is not supported" in both
    del paths["pid"]
    bundle = make(tmp_path / "b", "for n in /proc/self/ns/*; do readlink $n; done; id -u; hostname; echo > /x; sleep 9",
                  {**BARE, "linux.namespaces": namespaces("pid", **paths)})  # fmt: skip
    os.chown(bundle / "rootfs", 100000, 100000)
    os.chown(bundle / "rootfs/proc", 100000, 100000)
    pymigrate("run", "-d", "-b", bundle, "c")
    try:
        pid = pymigrate.state("c")["pid"]
        assert {link(kind, pid) for kind in paths} == {link(kind, other) for kind in paths}
        assert pymigrate("exec", "c", "sh", "-c", "id -u; hostname").stdout.split() == ["0", "joined"]
        wait_for(bundle / "rootfs/x")
        assert (bundle / "rootfs/x").stat().st_uid == 100000
    finally:
        pymigrate("delete", "-f", "c")


def test_own_files_are_no_namespaces(pymigrate: Local, tmp_path: Path, other: int) -> None:
    for path, words in (
        (tmp_path, "cannot be joined"),
        ("/no/such", "No such file"),
        (f"/proc/{other}/ns/uts", "cannot"),
    ):
        said = refusal(pymigrate, tmp_path, {**BARE, "linux.namespaces": namespaces("pid", network=str(path))})
        assert "linux.namespaces (network): " in said
        assert words in said


def test_no_pid_namespace_is_cleaned_up(pymigrate: Local, tmp_path: Path) -> None:
    kinds = [kind for kind in FILES if kind not in ("pid", "user")]
    bundle = make(tmp_path / "b", "sleep 61 & sleep 62 & wait", {**BARE, "linux.namespaces": namespaces(*kinds)})
    pymigrate("run", "-d", "-b", bundle, "c")
    pymigrate("kill", "--all", "c", "KILL")
    pymigrate("delete", "--force", "c")
    assert subprocess.run(["pgrep", "-f", "^sleep 6[12]$"], capture_output=True, text=True).stdout == ""


def test_names(pymigrate: Local, tmp_path: Path) -> None:
    said = output(pymigrate, tmp_path, "hostname; cat /proc/sys/kernel/domainname", {
        "hostname": "a-name", "domainname": "a.domain"})  # fmt: skip
    assert said.split() == ["a-name", "a.domain"]
    assert "a-name" not in (os.uname().nodename, Path("/proc/sys/kernel/domainname").read_text())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("field", ["hostname", "domainname"])
def test_names_of_the_host_stay(pymigrate: Local, tmp_path: Path, field: str, own: bool) -> None:
    before = os.uname().nodename
    spaces = namespaces("pid", uts="/proc/self/ns/uts") if own else namespaces("pid")
    said = refusal(pymigrate, tmp_path, {**BARE, field: "changed", "linux.namespaces": spaces})
    assert f"{field}: cannot be set: the container does not have" in said
    assert os.uname().nodename == before


def test_name_in_a_joined_namespace(pymigrate: Local, tmp_path: Path, other: int) -> None:
    spaces = namespaces("pid", uts=f"/proc/{other}/ns/uts")
    assert output(pymigrate, tmp_path, "hostname", {**BARE, "hostname": "mine", "linux.namespaces": spaces}) == "mine\n"


def test_sysctl(pymigrate: Local, tmp_path: Path) -> None:
    values = {
        "net.ipv4.ip_forward": "1", "net/ipv4/conf/lo/rp_filter": "2", "kernel.shmmax": "12345",
        "fs.mqueue.msg_max": "9", "kernel.msgmax": "4096", "kernel.sem": "250\t32000\t100\t128",
    }  # fmt: skip
    before = {name: Path("/proc/sys", name.replace(".", "/")).read_text() for name in values}
    files = " ".join(f"/proc/sys/{name.replace('.', '/')}" for name in values)
    said = output(pymigrate, tmp_path, f"cat {files}", {"linux.sysctl": values})
    assert said.splitlines() == list(values.values())
    assert {name: Path("/proc/sys", name.replace(".", "/")).read_text() for name in values} == before


@pytest.mark.parametrize(
    "name",
    ["kernel.panic", "vm.swappiness", "fs.file-max", "net/../kernel/panic", "net.//.kernel.panic",
     "kernel.shm/../panic", "kernel.shm_no_such", ""],
)  # fmt: skip
def test_sysctl_of_the_host_is_refused(pymigrate: Local, tmp_path: Path, name: str) -> None:
    before = Path("/proc/sys/kernel/panic").read_text()
    assert f"linux.sysctl.{name}: " in refusal(pymigrate, tmp_path, {"linux.sysctl": {name: "1"}})
    assert Path("/proc/sys/kernel/panic").read_text() == before


@pytest.mark.parametrize("spaces", [namespaces("pid"), namespaces("pid", network="/proc/self/ns/net")])
def test_sysctl_without_a_namespace_is_refused(pymigrate: Local, tmp_path: Path, spaces: list[dict[str, str]]) -> None:
    before = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    fields = {**BARE, "linux.namespaces": spaces, "linux.sysctl": {"net.ipv4.ip_forward": "1"}}
    assert "linux.sysctl.net.ipv4.ip_forward: " in refusal(pymigrate, tmp_path, fields)
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == before


def test_time_offsets(pymigrate: Local, tmp_path: Path) -> None:
    fields: Fields = {
        "linux.namespaces+": [{"type": "time"}],
        "linux.timeOffsets": {"boottime": {"secs": 10**6, "nanosecs": 5}, "monotonic": {"secs": 7 * 10**5}},
    }
    said = output(pymigrate, tmp_path, "cat /proc/uptime /proc/self/timens_offsets", fields).split("\n")
    host = float(Path("/proc/uptime").read_text().split()[0])
    assert 0 <= host + 10**6 - float(said[0].split()[0]) < 60
    assert [line.split() for line in said[1:3]] == [["monotonic", "700000", "0"], ["boottime", "1000000", "5"]]
    bundle = make(tmp_path / "d", "sleep 60", fields)
    pymigrate("run", "-d", "-b", bundle, "d")
    inside = float(pymigrate("exec", "d", "cat", "/proc/uptime").stdout.split()[0])
    assert inside > 10**6
    backwards = {**fields, "linux.timeOffsets": {"boottime": {"secs": -(10**12)}}}
    assert "linux.timeOffsets.boottime: cannot be set" in refusal(pymigrate, tmp_path, backwards)


def test_personality(pymigrate: Local, tmp_path: Path) -> None:
    assert output(pymigrate, tmp_path, "uname -m", {"linux.personality": {"domain": "LINUX32"}}) == "i686\n"
    assert (
        output(pymigrate, tmp_path, "uname -m", {"linux.personality": {"domain": "LINUX"}}) == f"{os.uname().machine}\n"
    )
    said = refusal(pymigrate, tmp_path, {"linux.personality": {"domain": "LINUX", "flags": ["X"]}})
    assert "linux.personality.flags: is not supported" in said
    bundle = make(tmp_path / "d", "sleep 60", {"linux.personality": {"domain": "LINUX32"}})
    pymigrate("run", "-d", "-b", bundle, "d")
    assert pymigrate("exec", "d", "uname", "-m").stdout == "i686\n"


def test_loopback_is_up(pymigrate: Local, tmp_path: Path) -> None:
    assert "LOOPBACK,UP" in output(pymigrate, tmp_path, "ip link")


def test_mount_namespace_is_asked_for(pymigrate: Local, tmp_path: Path) -> None:
    assert "linux.namespaces" in refusal(pymigrate, tmp_path, {**BARE, "linux.namespaces": [{"type": "pid"}]})
    joined = [{"type": "mount", "path": "/proc/self/ns/mnt"}]
    assert "linux.namespaces[0].path" in refusal(pymigrate, tmp_path, {**BARE, "linux.namespaces": joined})


def test_run_ends_as_its_program_without_a_pid_namespace(pymigrate: Local, tmp_path: Path) -> None:
    assert run(pymigrate, tmp_path, "exit 3", {**BARE, "linux.namespaces": namespaces("ipc")}).returncode == 3
