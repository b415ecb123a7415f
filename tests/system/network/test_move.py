"""Moves of containers with a network of their own: what their clients see of it."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.spec.default import default_spec
from tests.support.hosts import driver
from tests.system.conftest import Lab
from tests.system.move.test_move import assert_soon_clean
from tests.system.network.test_bridge import ADDRESSES, NET, PLACE, PROGRAMS, ask, inside, interfaces, make

CLIENT = "10.88.0.251"


def program(lab: Lab, name: str, *arguments: str) -> "subprocess.Popen[str]":
    text = (PROGRAMS / name).read_text()
    return lab.start("client", "python3", "-c", text, *arguments, stdin=subprocess.PIPE)


def line(process: "subprocess.Popen[str]", *, tell: bool = False) -> str:
    """The next line that a program prints, once it was told to go on."""
    assert process.stdin is not None
    assert process.stdout is not None
    if tell:
        process.stdin.write("\n")
        process.stdin.flush()
    found = process.stdout.readline().strip()
    assert found, process.communicate()[1]
    return found


class Watched:
    """A container with open connections in both directions, and what was seen of them once that is over."""

    streams: list[dict[str, Any]]
    ends: list[str]
    announced: dict[str, int]


@contextlib.contextmanager
def watched(lab: Lab, net: str = NET, *, root: int = 0, **changes: Any) -> Iterator[Watched]:
    """Connections of the host `client` to `web` at host1 and back that must outlive what is done meanwhile.

    `changes` are to its config.json; `root` is the owner of its files.

    Not one of them is lost, nothing that came over them, and nobody was told that one had ended.
    """
    client = program(lab, "net_client.py", CLIENT, *ADDRESSES)
    running = [client]
    try:
        assert line(client) == "listening"
        make(lab, CLIENT, **changes)
        lab.sh("host1", f"chown -hR {root}:{root} {PLACE}/rootfs")
        lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "--net", net, "web")
        assert line(client) == "ready"
        sniffer = program(lab, "net_sniffer.py", *ADDRESSES)
        running.append(sniffer)
        assert line(sniffer) == "ready"
        lab.wait_count("host1", 3)
        seen = Watched()
        yield seen
        seen.streams = json.loads(line(client, tell=True))
        found = json.loads(line(sniffer, tell=True))
        seen.ends, seen.announced = found["ends"], found["announced"]
        for stream in seen.streams:
            assert (stream["error"], stream["echoed"]) == ("", stream["sent"]), stream
            assert stream["sent"] > 100
        assert (seen.ends, found["missed"]) == ([], 0)
    finally:
        for process in running:
            process.kill()
            process.communicate()


def assert_in_order(lab: Lab, host: str) -> None:
    """The container's own connection: what was echoed to it."""
    lab.wait_count(host, lab.wait_count(host, 0) + 20)
    numbers = lab.numbers(host)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def mac_of(lab: Lab, host: str) -> str:
    return str(lab.state(host)["annotations"]["io.pymigrate.net"]).partition("mac=")[2][:17]


def port_of(lab: Lab, host: str, mac: str) -> str:
    """Where the bridge of a host sends what is for a hardware address."""
    return lab.sh(host, f"bridge fdb show br br0 | grep -v permanent | grep {mac}").split()[2]


def test_connections_go_on_there_and_back(lab: Lab) -> None:
    with watched(lab) as seen:
        mac = mac_of(lab, "host1")
        for source, target in (("host1", "host2"), ("host2", "host1")):
            lab.on(source, "pymigrate", "move", "web", target)
            lab.wait_count(target, lab.count(target) + 10)
            assert (lab.ids(source), interfaces(lab, source)) == ([], [])
            assert mac_of(lab, target) == mac
            assert f"link/ether {mac}" in inside(lab, target, "ip link show eth0")
            assert "default via fd88::251" in inside(lab, target, "ip -6 route")
            for address in ADDRESSES:
                assert f"lladdr {mac}" in lab.sh("client", f"ip neigh show {address}")
            assert [port_of(lab, target, mac)] == interfaces(lab, target)
            assert port_of(lab, source, mac) == "eth0"
        assert_in_order(lab, "host1")
    for address in ADDRESSES:
        assert seen.announced[address] > 4  # by its creation at most 4 times


@pytest.mark.slow
def test_a_network_of_a_user_namespace_goes_along(lab: Lab) -> None:
    """CRIU has to make it, inside; the container's root may still change it."""
    linux = default_spec()["linux"]
    linux["namespaces"].append({"type": "user"})
    ids = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    with watched(lab, root=100000, linux={**linux, "uidMappings": ids, "gidMappings": ids, "resources": {}}):
        for source, target in (("host1", "host2"), ("host2", "host1")):
            lab.on(source, "pymigrate", "move", "web", target)
            lab.wait_count(target, lab.count(target) + 10)
            assert inside(lab, target, "cat /proc/self/uid_map").split() == ["0", "100000", "65536"]
            assert "LOOPBACK,UP" in inside(lab, target, "ip link show lo")
        assert_in_order(lab, "host1")


@pytest.mark.slow
def test_new_connections_find_it(lab: Lab) -> None:
    """Also from a host that has spoken with it before, and has nothing open."""
    make(lab)
    lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "--net", NET, "web")
    lab.wait_count("host1", 1)
    for source, target in (("host1", "host2"), ("host2", "host1")):
        assert ask(lab, *ADDRESSES) == list(ADDRESSES)
        lab.on(source, "pymigrate", "move", "web", target)
        assert ask(lab, *ADDRESSES) == list(ADDRESSES)


FAIL = "raise OSError('test')"
KILL = "os.kill(os.getpid(), 9)"
SEED, FREEZE, PREPARED, GIVEN_UP = (
    "seed",
    "freeze",
    "stop-and-copy",
    "end-source",
)


@pytest.mark.parametrize("what", [FAIL, KILL], ids=["fails", "killed"])
@pytest.mark.parametrize("where", [SEED, FREEZE, PREPARED], ids=["seeded", "frozen", "prepared"])
def test_a_move_that_ends_early_is_not_seen(lab: Lab, where: str, what: str) -> None:
    with watched(lab):
        done = lab.on("host1", lab.python, "-c", driver(where, after=what), check=False)
        assert done.returncode == (10 if what == FAIL else 137), (done.returncode, done.stderr)
        if where == PREPARED and what == KILL:  # the images stay, in case that it was committed
            lab.on("host1", "pymigrate", "move", "web", "host2")
            assert_in_order(lab, "host2")
        else:
            assert_soon_clean(lab)
            assert_in_order(lab, "host1")
            assert interfaces(lab, "host2") == []
            assert len(interfaces(lab, "host1")) == 1


def test_a_coordinator_that_is_killed_when_it_has_given_up(lab: Lab) -> None:
    with watched(lab):
        done = lab.on("host1", lab.python, "-c", driver(GIVEN_UP, after=KILL), check=False)
        assert done.returncode == 137
        lab.on("host1", "pymigrate", "recover", "web")
        assert_in_order(lab, "host2")
        assert (interfaces(lab, "host1"), len(interfaces(lab, "host2"))) == ([], 1)


def test_the_link_is_down_before_a_process_is_killed(lab: Lab) -> None:
    """What the kernel says for a connection whose process has died must not leave the host."""
    make(lab)
    lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "--net", NET, "web")
    (name,) = interfaces(lab, "host1")
    look = f"subprocess.run('ip -o link show {name} > /run/link', shell=True)"
    lab.on("host1", lab.python, "-c", driver("kill", before=look))
    assert "state DOWN" in lab.sh("host1", "cat /run/link")


def test_the_bridge_is_called_otherwise(lab: Lab) -> None:
    lab.sh("host1", "ip link add br1 type bridge && ip link set br1 up")
    try:
        make(lab)
        lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "--net", NET.replace("br0", "br1"), "web")
        mac = mac_of(lab, "host1")
        done = lab.on("host1", "pymigrate", "validate", "web", "host2", check=False)
        assert done.returncode == 3
        assert "bridge: host2: bridge=br1: this host has no such interface" in done.stdout
        for net, words in (
            ("bridge=br0,ip=10.88.0.6/24", "must be bridge=NAME"),
            ("bridge=br7", "br7: this host has no"),
        ):
            done = lab.on("host1", "pymigrate", "move", "--net", net, "web", "host2", check=False)
            assert words in done.stderr, done.stderr
        for verb in ("validate", "move"):
            lab.on("host1", "pymigrate", verb, "--net", "bridge=br0", "web", "host2")
        assert ask(lab, *ADDRESSES) == list(ADDRESSES)
        assert mac_of(lab, "host2") == mac
    finally:
        lab.sh("host1", "ip link del br1")


def test_what_is_in_use_at_the_target(lab: Lab) -> None:
    make(lab)
    lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "--net", NET + ",ip=10.88.0.202/24", "web")
    place = make(lab, host="host2", container="other")
    lab.on("host2", "pymigrate", "run", "-d", "-b", place, "--net", NET, "other")
    done = lab.on("host1", "pymigrate", "move", "web", "host2", check=False)
    assert done.returncode == 3
    assert "address-in-use: host2: 10.88.0.202 is an address of the host itself" in done.stderr
    lab.on("host1", "pymigrate", "delete", "--force", "web")
    lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "--net", NET, "web")
    done = lab.on("host1", "pymigrate", "move", "web", "host2", check=False)
    assert done.returncode == 3
    assert "address-in-use: host2: 10.88.0.5 is the address of container other, which is running" in done.stderr


def test_interfaces_that_nobody_carries(lab: Lab) -> None:
    make(lab)
    lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "--net", NET, "web")
    lab.on("host1", "pymigrate", "validate", "web")
    pid = lab.state("host1")["pid"]
    lab.sh("host1", f"nsenter -t {pid} -n ip link add other0 type veth peer name other1")
    done = lab.on("host1", "pymigrate", "validate", "web", check=False)
    assert (done.returncode, "network-device: interface other0" in done.stdout) == (3, True), done.stdout
    assert "eth0" not in done.stdout


def test_a_snapshot_and_its_clone(lab: Lab) -> None:
    make(lab)
    lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "--net", NET, "web")
    lab.wait_count("host1", 1)
    mac = mac_of(lab, "host1")
    place = "/var/lib/pymigrate/test/snapshot"
    lab.on("host1", "pymigrate", "snapshot", "save", "web", place)
    done = lab.on("host1", "pymigrate", "snapshot", "restore", place, "--id", "clone", check=False)
    assert (done.returncode, "10.88.0.5 is the address of container web, which is running" in done.stderr) == (5, True)
    assert (lab.ids("host1"), len(interfaces(lab, "host1"))) == (["web"], 1)
    net = "bridge=br0,ip=10.88.0.6/24"
    lab.on("host1", "pymigrate", "snapshot", "restore", place, "--id", "clone", "--net", net)
    assert ask(lab, *ADDRESSES, "10.88.0.6") == [*ADDRESSES, "10.88.0.6"]
    for container in ("web", "clone"):
        lab.on("host1", "pymigrate", "delete", "--force", container)
    lab.on("host1", "pymigrate", "snapshot", "restore", place)
    assert ask(lab, *ADDRESSES) == list(ADDRESSES)
    assert mac_of(lab, "host1") == mac


def test_checkpoint_and_restore(lab: Lab) -> None:
    """As an engine calls them; the network is the bundle's, or that of --net."""
    make(lab, annotations={"io.pymigrate.net": NET})
    images = "/var/lib/pymigrate/test/images"
    lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "web")
    for net, addresses in ((None, ADDRESSES), ("bridge=br0,ip=10.88.0.6/24", ["10.88.0.6"])):
        lab.on("host1", "pymigrate", "checkpoint", "--image-path", images, "web")
        assert interfaces(lab, "host1") == []
        flags = [] if net is None else ["--net", net]
        lab.on("host1", "pymigrate", "restore", "-d", "-b", PLACE, "--image-path", images, *flags, "web")
        assert ask(lab, *addresses) == list(addresses)
        lab.sh("host1", f"rm -rf {images}")
