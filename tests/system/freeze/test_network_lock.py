"""What a container that leaves leaves locked in a network namespace that others go on using."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.support.hosts import driver
from tests.system.conftest import Lab
from tests.system.network.test_bridge import ADDRESSES, PLACE, make
from tests.system.network.test_move import assert_in_order, watched

pytestmark = pytest.mark.system

SHARED = "ns:/run/netns/shared"
SPEAK = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
socket.create_connection(listener.getsockname(), float(sys.argv[1]))
"""


@contextlib.contextmanager
def shared(lab: Lab) -> Iterator[None]:
    """A namespace of the same addresses at both hosts; that of host1 is connected."""
    add = "".join(f"ip -n shared addr add {address} dev eth0 nodad && " for address in ("10.88.0.5/24", "fd88::5/64"))
    script = (
        "ip netns add shared && ip link add shared type veth peer name eth0 netns shared && "
        "ip -n shared link set eth0 address 02:88:00:00:00:05 && ip -n shared link set lo up && "
        f"{add} ip -n shared link set eth0 up && ip link set shared master br0"
    )
    try:
        for host in ("host1", "host2"):
            lab.sh(host, script)
        connect(lab, "host1")
        yield
    finally:
        for host in ("host1", "host2"):
            lab.sh(host, "ip link del shared; ip netns del shared", check=False)


def connect(lab: Lab, host: str) -> None:
    """The namespace of one host is the one that can be reached."""
    for name in ("host1", "host2"):
        lab.sh(name, f"ip link set shared {'up' if name == host else 'down'}")
    ping = (
        "ip netns exec shared python3 -c 'import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto({})'"
    )
    lab.sh(host, ping.format('b"", ("10.88.0.251", 9)'), check=False)  # the bridges learn where it is


def tables(lab: Lab, host: str, *, of: str = "ip netns exec shared") -> list[str]:
    return [line.split()[-1] for line in lab.sh(host, f"{of} nft list tables").splitlines()]


def speak(lab: Lab, host: str, *, patience: float = 3.0) -> None:
    lab.on(host, "ip", "netns", "exec", "shared", "python3", "-c", SPEAK, patience)


@pytest.mark.slow
def test_a_joined_namespace_serves_others_and_the_container_again(lab: Lab) -> None:
    with shared(lab), watched(lab, SHARED) as seen:
        for source, target in (("host1", "host2"), ("host2", "host1")):
            lab.on(source, "pymigrate", "move", "web", target)
            speak(lab, source)
            (table,) = tables(lab, source)
            assert table.startswith("CRIU-")
            assert tables(lab, target) == []
            connect(lab, target)
            lab.wait_count(target, lab.count(target) + 10)
        assert_in_order(lab, "host1")
    assert len(seen.streams) == len(ADDRESSES)


def test_a_move_that_ends_early_leaves_no_lock(lab: Lab) -> None:
    with shared(lab), watched(lab, SHARED):
        for what, status in (("raise OSError('test')", 10), ("os.kill(os.getpid(), 9)", 137)):
            program = driver("stop-and-copy", after=what)
            assert lab.on("host1", lab.python, "-c", program, check=False).returncode == status
            assert_in_order(lab, "host1")
            assert tables(lab, "host1") == []


def test_a_killed_coordinator_leaves_it_to_recover(lab: Lab) -> None:
    with shared(lab), watched(lab, SHARED):
        program = driver("kill", after="os.kill(os.getpid(), 9)")
        assert lab.on("host1", lab.python, "-c", program, check=False).returncode == 137
        with pytest.raises(AssertionError, match="TimeoutError"):
            speak(lab, "host1", patience=1.0)
        lab.on("host1", "pymigrate", "recover", "web")
        speak(lab, "host1")
        connect(lab, "host2")
        assert_in_order(lab, "host2")


@pytest.mark.parametrize("way", ["snapshot", "checkpoint"])
def test_images_of_a_container_that_ended(lab: Lab, way: str) -> None:
    """Others speak meanwhile, and the restore finds the namespace as it was."""
    place = "/var/lib/pymigrate/test/images"
    with shared(lab), watched(lab, SHARED):
        if way == "snapshot":
            lab.on("host1", "pymigrate", "snapshot", "save", "--stop", "web", place)
            lab.on("host1", "pymigrate", "delete", "--force", "web")
        else:
            lab.on("host1", "pymigrate", "checkpoint", "--image-path", place, "--tcp-established", "web")
        speak(lab, "host1")
        assert len(tables(lab, "host1")) == 1
        if way == "snapshot":
            lab.on("host1", "pymigrate", "snapshot", "restore", place, "--tcp-established")
        else:
            argv = ["pymigrate", "restore", "-d", "-b", PLACE, "--image-path", place, "--net", SHARED, "web"]
            lab.on("host1", *argv, "--tcp-established")
        assert tables(lab, "host1") == []
        lab.wait_count("host1", lab.count("host1") + 10)


INSIDE = """
import socket, time
listener = socket.create_server(("127.0.0.1", 0))
ends = [socket.create_connection(listener.getsockname()), listener.accept()[0]]
print(1, flush=True)
while True:
    for one, other in (ends, ends[::-1]):
        one.sendall(b"x")
        assert other.recv(1) == b"x"
    time.sleep(0.01)
"""


def test_the_network_of_the_host_is_as_it_was(lab: Lab) -> None:
    """Where CRIU locks the connections of the container only."""
    from tests.system.network import test_bridge

    original, test_bridge.SERVER = test_bridge.SERVER, INSIDE
    try:
        make(lab)
    finally:
        test_bridge.SERVER = original
    lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "--net", "host", "web")
    lab.wait_count("host1", 0)
    before = tables(lab, "host1", of="")
    look = "subprocess.run('nft list ruleset > /run/frozen', shell=True)"
    lab.on("host1", lab.python, "-c", driver("end-source", before=look))
    frozen = lab.sh("host1", "cat /run/frozen")
    assert "CRIU-" in frozen
    assert "policy drop" not in frozen
    assert [tables(lab, host, of="") for host in ("host1", "host2")] == [before, before]
    lab.on("host2", "pymigrate", "move", "web", "host1")
    assert [tables(lab, host, of="") for host in ("host1", "host2")] == [before, before]
    done = lab.on("host1", "pymigrate", "state", "web")
    assert '"running"' in done.stdout
