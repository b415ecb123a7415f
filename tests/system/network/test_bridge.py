"""Containers with a network of their own on a bridge, as the host `client` of the lab sees them."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from runtime.spec.default import default_spec
from tests.support.hosts import write_bundle
from tests.system.conftest import Lab

PLACE = "/var/lib/pymigrate/test/web"
PROGRAMS = Path(__file__).parents[2] / "workloads"
ADDRESSES = ("10.88.0.5", "fd88::5")
NET = "bridge=br0,ip=10.88.0.5/24,ip=fd88::5/64,gw=10.88.0.251,gw=fd88::251"

SERVER = (PROGRAMS / "net_server.py").read_text()
ASK = """
import socket, sys
for host in sys.argv[1:]:
    with socket.create_connection((host, 7), 5) as stream:
        stream.sendall(host.encode())
        print(stream.recv(100).decode())
"""


def make(lab: Lab, *arguments: str, host: str = "host1", container: str = "web", **changes: Any) -> str:
    """A bundle of the server, with this machine's /usr; its place in the host."""
    with tempfile.TemporaryDirectory() as directory:
        bundle = Path(directory, container)
        write_bundle(bundle, "", **changes)
        config = json.loads((bundle / "config.json").read_text())
        config["process"]["args"] = ["/usr/bin/python3", "-I", "-S", "-u", "-c", SERVER, *arguments]
        (bundle / "rootfs/lib64").unlink()  # to lib
        (bundle / "rootfs/lib64").mkdir()
        for place, source in (("/usr", "/usr"), ("/lib", "/usr/lib"), ("/lib64", "/usr/lib64")):
            config["mounts"].append({"destination": place, "source": source, "type": "bind", "options": ["bind", "ro"]})
        (bundle / "config.json").write_text(json.dumps(config))
        place = f"/var/lib/pymigrate/test/{container}"
        lab.put(host, bundle, place)
    return place


def ask(lab: Lab, *hosts: str) -> list[str]:
    return lab.on("client", "python3", "-c", ASK, *hosts).stdout.split()


def interfaces(lab: Lab, host: str) -> list[str]:
    """The interfaces of a host but its own three."""
    names = [line.split(":")[1].strip().partition("@")[0] for line in lab.sh(host, "ip -o link").splitlines()]
    return [name for name in names if name not in ("lo", "eth0", "br0")]


def inside(lab: Lab, host: str, command: str, container: str = "web") -> str:
    return lab.on(host, "pymigrate", "exec", container, "sh", "-c", command).stdout


@pytest.mark.parametrize("text", ["host", NET])
def test_what_an_image_may_have_said_is_not_heeded(lab: Lab, text: str) -> None:
    """Engines hand annotations on, and ask for a pid file: none reaches the host's network or a bridge by it."""
    make(lab, annotations={"io.pymigrate.net": text})
    ask_for = ["--pid-file", "/run/pid", "-b", PLACE]
    done = lab.on("host1", "pymigrate", "create", *ask_for, "web", check=False)
    assert done.returncode == 6
    assert "annotations.io.pymigrate.net: is ignored together with --pid-file" in done.stderr
    assert lab.ids("host1") == []
    lab.on("host1", "pymigrate", "create", *ask_for, "--net", "none", "web")
    assert inside(lab, "host1", "ls /sys/class/net") == "lo\n"


@pytest.mark.parametrize("way", ["flag", "annotation"])
def test_it_is_reachable_and_leaves_nothing(lab: Lab, way: str) -> None:
    annotations = {"io.pymigrate.net": NET if way == "annotation" else "none"}
    make(lab, annotations=annotations)
    flags = ["--net", NET] if way == "flag" else []
    lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, *flags, "web")
    lab.wait_count("host1", 1)
    assert ask(lab, *ADDRESSES) == list(ADDRESSES)
    (name,) = interfaces(lab, "host1")
    assert "alias web" in lab.sh("host1", f"ip link show {name}")
    shown = json.loads(lab.on("host1", "pymigrate", "state", "web").stdout)["annotations"]["io.pymigrate.net"]
    mac = shown.partition("mac=")[2][:17]
    assert shown == f"{NET},mac={mac},name=eth0"
    assert f"link/ether {mac}" in inside(lab, "host1", "ip link show eth0")
    routes = inside(lab, "host1", "ip route; ip -6 route")
    assert "default via 10.88.0.251 dev eth0" in routes
    assert "default via fd88::251 dev eth0" in routes
    lab.on("host1", "pymigrate", "delete", "--force", "web")
    assert interfaces(lab, "host1") == []


def test_fields(lab: Lab) -> None:
    make(lab)
    net = "bridge=br0,ip=10.88.0.5/24,mac=02:00:00:00:00:05,name=net0,mtu=1300"
    lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "--net", net, "web")
    shown = inside(lab, "host1", "ip link show net0")
    assert ("mtu 1300" in shown, "02:00:00:00:00:05" in shown) == (True, True), shown


def test_it_is_there_before_the_hooks(lab: Lab) -> None:
    hook = {"path": "/bin/sh", "args": ["sh", "-c", "ip -o link > /run/links"]}
    make(lab, hooks={"createRuntime": [hook]})
    lab.on("host1", "pymigrate", "create", "-b", PLACE, "--net", NET, "web")
    assert len(lab.sh("host1", "cat /run/links").splitlines()) == 4


def test_host_none_and_another_namespace(lab: Lab) -> None:
    make(lab)
    make(lab, container="first")
    first = "/var/lib/pymigrate/test/first"
    lab.on("host1", "pymigrate", "run", "-d", "-b", first, "--net", NET, "first")
    pid = lab.state("host1", "first")["pid"]
    for net, addresses in (
        ("host", {"10.77.0.1", "10.88.0.201"}),
        ("none", set()),
        (f"ns:/proc/{pid}/ns/net", {"10.88.0.5"}),
        (f"/proc/{pid}/ns/net", {"10.88.0.5"}),
    ):
        lab.on("host1", "pymigrate", "create", "-b", PLACE, "--net", net, "web")
        lines = inside(lab, "host1", "ip -4 -o addr").splitlines()
        assert {line.split()[3].partition("/")[0] for line in lines} - {"127.0.0.1"} == addresses
        lab.on("host1", "pymigrate", "delete", "--force", "web")
    assert len(interfaces(lab, "host1")) == 1  # the first one's is still there


def test_user_namespace(lab: Lab) -> None:
    """The network belongs to the container's own user namespace: its root may use it as root does."""
    ids = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    linux = default_spec()["linux"]
    linux["namespaces"].append({"type": "user"})
    make(lab, linux={**linux, "uidMappings": ids, "gidMappings": ids, "resources": {}})
    lab.sh("host1", f"chown -R 100000:100000 {PLACE}/rootfs")
    lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "--net", NET, "web")
    lab.wait_count("host1", 1)
    assert ask(lab, *ADDRESSES) == list(ADDRESSES)
    lab.on("host1", "pymigrate", "delete", "--force", "web")
    assert interfaces(lab, "host1") == []


@pytest.mark.parametrize(
    ("net", "code", "words"),
    [
        ("bridge=br9,ip=10.88.0.5/24", 6, "--net: bridge=br9: this host has no such interface"),
        ("bridge=eth0,ip=10.88.0.5/24", 6, "--net: bridge=eth0: is not a bridge"),
        ("bridge=br0,ip=10.88.0.5", 6, "--net: ip=10.88.0.5: is not an interface's address"),
        ("bridge=br0,ip=10.88.0.6/24", 5, "--net: 10.88.0.6 is the address of container other, which is running"),
        ("bridge=br0,ip=10.88.0.201/24", 5, "--net: 10.88.0.201 is an address of the host itself"),
        ("bridge=br0,ip=10.88.0.5/24,ip=fd88:0::201/64", 5, "--net: fd88::201 is an address of the host itself"),
        ("ns:/run/no/such", 1, "linux.namespaces (network): /run/no/such: No such file or directory"),
    ],
)
def test_what_cannot_be_had(lab: Lab, net: str, code: int, words: str) -> None:
    make(lab)
    make(lab, container="other")
    place = "/var/lib/pymigrate/test/other"
    lab.on("host1", "pymigrate", "run", "-d", "-b", place, "--net", "bridge=br0,ip=10.88.0.6/24", "other")
    done = lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "--net", net, "web", check=False)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert lab.ids("host1") == ["other"]
    assert len(interfaces(lab, "host1")) == 1


def test_a_create_that_fails_or_is_killed_leaves_nothing(lab: Lab) -> None:
    make(lab, hooks={"createRuntime": [{"path": "/bin/false"}]})
    assert lab.on("host1", "pymigrate", "create", "-b", PLACE, "--net", NET, "web", check=False).returncode == 1
    assert interfaces(lab, "host1") == []
    lab.sh("host1", f"rm -rf {PLACE}")
    make(lab, hooks={"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", "kill -9 $PPID; sleep 0.1"]}]})
    assert lab.on("host1", "pymigrate", "create", "-b", PLACE, "--net", NET, "web", check=False).returncode != 0
    lab.on("host1", "pymigrate", "delete", "--force", "web")
    assert interfaces(lab, "host1") == []
