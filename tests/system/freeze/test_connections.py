"""Moves and snapshots of a container with TCP connections in all states, whose other ends are at the host `client`."""

import contextlib
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.pybox import write_python_bundle
from tests.system.conftest import Lab
from tests.system.network.test_bridge import ADDRESSES, NET, PLACE, PROGRAMS
from tests.system.network.test_move import CLIENT, line, program

pytestmark = pytest.mark.system

ADDRESS = "10.88.0.5"
PATTERN = bytes(range(251)) * 20000
WHOLE = [len(PATTERN), hashlib.sha256(PATTERN).hexdigest()]


def part(text: bytes) -> list[Any]:
    return [len(text), hashlib.sha256(text).hexdigest()]


def run(lab: Lab, text: str, *arguments: str, net: str = NET) -> None:
    with tempfile.TemporaryDirectory() as directory:
        write_python_bundle(Path(directory, "web"), text, *arguments)
        lab.put("host1", Path(directory, "web"), PLACE)
    lab.on("host1", "pymigrate", "run", "-d", "-b", PLACE, "--net", net, "web")


class Ends:
    """The other ends, and what was heard of the connections in the network."""

    def __init__(self, lab: Lab, address: str, client: str, peer: str) -> None:
        self._client = program(lab, "conn_client.py", client, address)
        self.running = [self._client]
        assert line(self._client) == "listening"
        run(lab, (PROGRAMS / "conn_server.py").read_text(), peer)
        assert line(self._client) == "ready"
        self._sniffer = program(lab, "net_sniffer.py", address)
        self.running.append(self._sniffer)
        assert line(self._sniffer) == "ready"

    def heard(self) -> list[str]:
        """The segments with RST or FIN so far; nothing is listened to any more."""
        found = json.loads(line(self._sniffer, tell=True))
        assert found["missed"] == 0
        ends: list[str] = found["ends"]
        return ends

    def finish(self) -> dict[str, Any]:
        """What came out of the connections at their end here."""
        found: dict[str, Any] = json.loads(line(self._client, tell=True))
        return found


@contextlib.contextmanager
def ends(lab: Lab, address: str = ADDRESS, client: str = CLIENT, peer: str = CLIENT) -> Iterator[Ends]:
    """The container is at `address`, the other ends at `client`, which the container calls `peer`."""
    running: list[subprocess.Popen[str]] = []
    try:
        made = Ends(lab, address, client, peer)
        running = made.running
        wait_log(lab, "host1", "ready")
        yield made
    finally:
        for process in running:
            process.kill()
            process.communicate()


def wait_log(lab: Lab, host: str, word: str) -> list[str]:
    """What the container has written, once the word is in it."""
    script = (
        f"for i in $(seq 200); do pymigrate logs web | grep -q '{word}' && break; sleep 0.1; done; pymigrate logs web"
    )
    text = lab.sh(host, script)
    assert word in text, text
    return text.splitlines()


def results(lines: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in lines:
        if text.startswith("{"):
            found |= json.loads(text)
    return found


def assert_whole(lab: Lab, host: str, made: Ends) -> None:
    """Every byte came, in order, in both directions of every connection, and every end was where it belongs."""
    seen = made.finish()
    assert seen == {
        "7001": WHOLE, "7002": part(b""), "7003": part(b"still here"), "back": ["mine", ""], "control": "done",
    }  # fmt: skip
    assert results(wait_log(lab, host, '"out"')) == {
        "7001": WHOLE, "7002": part(b"after your end"), "7003": part(b"last words"), "out": "yours",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("address", "client", "peer"),
    [(ADDRESS, CLIENT, CLIENT), (ADDRESSES[1], "fd88::251", "fd88::251"), (ADDRESS, CLIENT, f"::ffff:{CLIENT}")],
    ids=["ipv4", "ipv6", "ipv4-mapped"],
)
def test_every_state_goes_there_and_back(lab: Lab, address: str, client: str, peer: str) -> None:
    with ends(lab, address, client, peer) as made:
        lab.on("host1", "pymigrate", "validate", "web", "host2")
        lab.on("host1", "pymigrate", "move", "web", "host2")
        lab.on("host2", "pymigrate", "move", "web", "host1")
        assert made.heard() == []
        assert_whole(lab, "host1", made)


def test_a_snapshot_leaves_the_connections_alone(lab: Lab) -> None:
    place = "/var/lib/pymigrate/test/snapshot"
    with ends(lab) as made:
        lab.on("host1", "pymigrate", "snapshot", "save", "web", place)
        argv = ("pymigrate", "snapshot", "restore", place, "--id", "clone", "--net", "bridge=br0,ip=10.88.0.6/24")
        done = lab.on("host1", *argv, check=False)
        assert done.returncode != 0
        assert f"tcp {ADDRESS}:7001 -> {CLIENT}:" in done.stderr
        assert "--tcp-close" in done.stderr
        lab.on("host1", *argv, "--tcp-close")
        lab.on("host1", "pymigrate", "delete", "--force", "clone")
        assert made.heard() == []
        assert_whole(lab, "host1", made)


def test_connections_go_on_from_a_snapshot_that_ended_the_container(lab: Lab) -> None:
    place = "/var/lib/pymigrate/test/snapshot"
    with ends(lab) as made:
        lab.on("host1", "pymigrate", "snapshot", "save", "--stop", "web", place)
        lab.on("host1", "pymigrate", "delete", "--force", "web")
        lab.on("host1", "pymigrate", "snapshot", "restore", place, "--tcp-established")
        assert made.heard() == []
        assert_whole(lab, "host1", made)


def test_connections_are_closed_at_a_target_in_another_network(lab: Lab) -> None:
    text = """
import os, select, socket, time
listener = socket.create_server(("", 7001))
sock, _ = listener.accept()
print("ready", flush=True)
while not select.select([sock], [], [], 0.02)[0]:
    pass
print("read", sock.recv(10), flush=True)
try:
    sock.send(b"x")
except OSError as error:
    print("sent", type(error).__name__, flush=True)
listener.accept()
print("accepted", flush=True)
time.sleep(1000)
"""
    run(lab, text)
    client = lab.start("client", "python3", "-c", HOLD, stdin=subprocess.PIPE)
    sniffer = program(lab, "net_sniffer.py", ADDRESS)
    try:
        assert line(client) == "on"
        assert line(sniffer) == "ready"
        wait_log(lab, "host1", "ready")
        lab.on("host1", "pymigrate", "move", "--tcp-close", "web", "host2")
        lines = wait_log(lab, "host2", "sent")
        assert lines[1:] == ["read b''", "sent BrokenPipeError"]
        assert json.loads(line(sniffer, tell=True))["ends"] == []
        lab.on("client", "python3", "-c", f"import socket; socket.create_connection(('{ADDRESS}', 7001), 5)")
        wait_log(lab, "host2", "accepted")
    finally:
        for process in (client, sniffer):
            process.kill()
            process.communicate()


WAITING = """
import os, socket, time
listener = socket.create_server(("", 7001))
print("ready", flush=True)
while not os.path.exists("/tmp/go"):
    time.sleep(0.01)
sock, _ = listener.accept()
sock.sendall(b"hello")
print("end", flush=True)
time.sleep(1000)
"""
CONNECT = f"import socket; s = socket.create_connection(('{ADDRESS}', 7001)); print('on', flush=True); print(s.recv(5))"


@pytest.mark.parametrize("accepted", [False, True])
def test_a_connection_that_is_not_accepted_yet(lab: Lab, accepted: bool) -> None:
    """The move waits for it a moment; then it is refused, naming it, and nothing has happened."""
    run(lab, WAITING)
    wait_log(lab, "host1", "ready")
    client = lab.start("client", "python3", "-c", CONNECT)
    try:
        assert line_of(client) == "on"
        go = f"touch /proc/{lab.state('host1')['pid']}/root/tmp/go"
        if accepted:
            lab.sh("host1", f"(sleep 0.5; {go}) >/dev/null 2>&1 & exec pymigrate move web host2")
            assert line_of(client) == "b'hello'"
            return
        done = lab.on("host1", "pymigrate", "move", "web", "host2", check=False)
        assert done.returncode == 3
        assert "tcp-backlog" in done.stderr
        assert "tcp 0.0.0.0:7001 has 1 connection not accepted yet" in done.stderr
        lab.sh("host1", go)
        assert line_of(client) == "b'hello'"
    finally:
        client.kill()
        client.communicate()


HOLD = f"""
import socket, sys
held = socket.create_connection(('{ADDRESS}', 7001))
print('on', flush=True)
sys.stdin.read()
"""


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


BIND = """
import socket, sys, time
held = []
for number, text in enumerate(sys.argv[1].split(), 7101):
    kind, address, *only = text.split(",")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    held.append(socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM))
    if family == socket.AF_INET6:
        held[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bool(only))
    held[-1].bind((address, number))
    if kind == "tcp":
        held[-1].listen()
print("ready", flush=True)
sys.stdin.read()
time.sleep(*map(int, sys.argv[2:]))
"""
# In the container; at the target; whether they are in each other's way.
PORTS = [
    ("tcp,0.0.0.0", "tcp,127.0.0.1", True),
    ("tcp,::", "tcp,0.0.0.0", True),
    ("tcp,127.0.0.1", "tcp,::", True),
    ("udp,0.0.0.0", "udp,0.0.0.0", True),
    ("udp,::1", "udp,::,only", True),
    ("tcp,::,only", "tcp,0.0.0.0", False),
    ("udp,0.0.0.0", "tcp,0.0.0.0", False),
    ("tcp,127.0.0.2", "tcp,127.0.0.1", False),
]


@pytest.mark.parametrize("net", ["host", "ns:/run/netns/joined"])
def test_ports_that_somebody_has_at_the_target(lab: Lab, net: str) -> None:
    enter: list[str] = []
    if net != "host":
        enter = ["nsenter", f"--net={net[3:]}"]
        for host in ("host1", "host2"):
            lab.sh(host, "ip netns add joined && ip -n joined link set lo up")
    lab.on("host1", *enter, "ip", "addr", "add", "10.99.0.1/32", "dev", "lo")
    try:
        run(lab, BIND, " ".join([*(inside for inside, _, _ in PORTS), "tcp,10.99.0.1"]), "1000", net=net)
        wait_log(lab, "host1", "ready")
        holder = lab.start(
            "host2", *enter, "python3", "-c", BIND, " ".join(there for _, there, _ in PORTS), "0", stdin=subprocess.PIPE
        )
        try:
            assert line_of(holder) == "ready"
            done = lab.on("host1", "pymigrate", "--json", "validate", "web", "host2", check=False)
        finally:
            holder.communicate("")
        found = {b["where"]: b["problem"] for b in json.loads(done.stdout)["blockers"] if b["rule"] == "port-in-use"}
        shown = {"tcp,::": "tcp [::]", "udp,::1": "udp [::1]"}
        taken = {
            f"host2: {shown.get(inside, inside.replace(',', ' '))}:{number}"
            for number, (inside, _, clash) in enumerate(PORTS, 7101)
            if clash
        }
        missing = {"host2: tcp 10.99.0.1:7109": "cannot be bound there: the host does not have this address"}
        assert found.keys() == taken | missing.keys()
        assert all("is in use there by process " in found[name] and "(python3)" in found[name] for name in taken), found
        lab.on("host2", *enter, "ip", "addr", "add", "10.99.0.1/32", "dev", "lo")
        lab.on("host1", "pymigrate", "move", "web", "host2")
    finally:
        for host in ("host1", "host2"):
            lab.sh(host, "pymigrate delete -f web; ip addr del 10.99.0.1/32 dev lo; ip netns del joined", check=False)


def test_a_container_in_the_network_of_its_host(lab: Lab) -> None:
    """It moves when nothing is connected; a connection is named."""
    run(lab, WAITING, net="host")
    wait_log(lab, "host1", "ready")
    lab.on("host1", "pymigrate", "move", "web", "host2")
    lab.sh("host2", f"touch /proc/{lab.state('host2')['pid']}/root/tmp/go")
    text = CONNECT.replace(ADDRESS, "10.88.0.202") + "; s.recv(1)"
    client = lab.start("client", "python3", "-c", text)
    try:
        assert line_of(client) == "on"
        wait_log(lab, "host2", "end")
        done = lab.on("host2", "pymigrate", "validate", "web", "host1", check=False)
        assert done.returncode == 3
        assert "host-network: process " in done.stdout
        assert f"tcp 10.88.0.202:7001 -> {CLIENT}:" in done.stdout
        lab.on("host2", "pymigrate", "validate", "--tcp-close", "web", "host1")
    finally:
        client.terminate()
        client.communicate()


SPEAKER = """
import signal, socket, struct, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
listener = socket.create_server(("", 7001))
sock, _ = listener.accept()
while sock.recv(100):
    pass
print("ready")
while True:
    signal.sigwait({signal.SIGUSR1})
    sock.sendall(struct.pack("d", time.time()))
"""
# It prints how many seconds what has come was under way.
HEARER = """
import socket, struct, sys, time
while True:
    try:
        sock = socket.create_connection((sys.argv[1], 7001), 60)
        break
    except ConnectionRefusedError:  # the container's program does not listen yet
        time.sleep(0.02)
sock.shutdown(socket.SHUT_WR)
print("closed", flush=True)
while data := sock.recv(8):
    print(time.time() - struct.unpack("d", data)[0], flush=True)
"""


def test_a_connection_whose_peer_has_closed_its_half_sends_at_once(lab: Lab) -> None:
    """CRIU ends it with a segment that says, as if from the peer, that nothing may be sent for now."""
    run(lab, SPEAKER)
    hearer = lab.start("client", "python3", "-c", HEARER, ADDRESS, stdin=subprocess.PIPE)
    try:
        assert line(hearer) == "closed"
        wait_log(lab, "host1", "ready")
        took = {}
        for source, target in (("host1", "host2"), ("host2", "host1")):
            lab.on(source, "pymigrate", "move", "web", target)
            lab.on(target, "pymigrate", "kill", "web", "USR1")
            took[target] = float(line(hearer))
        assert max(took.values()) < 2, took  # seconds; 3 before the kernel asks the peer
    finally:
        hearer.terminate()
        hearer.communicate()
