"""Moves of a container to which new connections are made all the time."""

import json
import subprocess

import pytest

from tests.support.hosts import driver
from tests.system.conftest import Lab
from tests.system.freeze.test_connections import ADDRESS, run, wait_log
from tests.system.network.test_bridge import NET
from tests.system.network.test_move import line

pytestmark = pytest.mark.system

SERVER = """
import socket
listener = socket.create_server(("", 7001))
print("ready", flush=True)
while True:
    sock, _ = listener.accept()
    with sock:
        sock.sendall(sock.recv(10))
"""
CLIENT = f"""
import json, select, socket, sys, time
longest, count, failed = 0.0, 0, []
while not select.select([sys.stdin], [], [], 0.003)[0]:
    begin = time.monotonic()
    try:
        with socket.create_connection(("{ADDRESS}", 7001), 20) as sock:
            longest = max(longest, time.monotonic() - begin)
            sock.sendall(b"hello")
            if sock.recv(10) != b"hello":
                failed.append("cut")
    except OSError as error:
        failed.append(repr(error))
    count += 1
    if count == 1:
        print("on", flush=True)
print(json.dumps({{"longest": longest, "count": count, "failed": failed}}), flush=True)
"""


@pytest.mark.slow
def test_a_busy_server_goes_there_and_back(lab: Lab) -> None:
    """No move is rolled back, and no connection fails."""
    run(lab, SERVER)
    wait_log(lab, "host1", "ready")
    client = lab.start("client", "python3", "-c", CLIENT, stdin=subprocess.PIPE)
    try:
        assert line(client) == "on"
        for _ in range(5):
            for source, target in (("host1", "host2"), ("host2", "host1")):
                lab.on(source, "pymigrate", "move", "web", target)
        seen = json.loads(line(client, tell=True))
        assert seen["failed"] == []
        assert seen["count"] > 10
    finally:
        client.kill()
        client.communicate()


LOOK = """
import subprocess, sys
from criu_rpc.client import Criu
from migrate.cli import main
dump, tables = Criu.dump, sys.argv.pop(1)
def looked(*args, **options):
    subprocess.run(tables + " > /run/closed", shell=True)
    return dump(*args, **options)
Criu.dump = looked
sys.exit(main(sys.argv[1:]))
"""
SAVE = {
    "snapshot": ("snapshot", "save", "web", "/var/lib/pymigrate/saved"),
    "checkpoint": ("checkpoint", "--leave-running", "--image-path", "/var/lib/pymigrate/saved", "web"),
}


@pytest.mark.parametrize("verb", SAVE)
def test_nobody_connects_while_a_container_is_saved(lab: Lab, verb: str) -> None:
    run(lab, SERVER)
    wait_log(lab, "host1", "ready")
    tables = f"nsenter -t {lab.state('host1')['pid']} -n nft list ruleset"
    lab.on("host1", lab.python, "-c", LOOK, tables, *SAVE[verb])
    assert "tcp flags syn / syn,ack" in lab.sh("host1", "cat /run/closed")
    assert lab.sh("host1", tables) == ""
    lab.on("client", "python3", "-c", f"import socket; socket.create_connection(('{ADDRESS}', 7001), 0.9)")


@pytest.mark.parametrize("what", ["raise OSError('test')", "os.kill(os.getpid(), 9)"], ids=["fails", "killed"])
@pytest.mark.parametrize("net", [NET, "host"], ids=["own", "host"])
def test_the_gate_is_open_again_after_a_move_that_ends_early(lab: Lab, net: str, what: str) -> None:
    run(lab, SERVER, net=net)
    wait_log(lab, "host1", "ready")
    tables = f"nsenter -t {lab.state('host1')['pid']} -n nft list ruleset"
    before = f"subprocess.run('{tables} > /run/closed', shell=True); {what}"
    lab.on("host1", lab.python, "-c", driver("freeze", before=before), check=False)
    closed = lab.sh("host1", "cat /run/closed")
    assert "tcp flags syn / syn,ack" in closed
    assert ("tcp dport 7001" in closed) == (net == "host")
    assert "pymigrate-gate" not in lab.sh("host1", tables)
    address = ADDRESS if net == NET else "10.88.0.201"
    lab.on("client", "python3", "-c", f"import socket; socket.create_connection(('{address}', 7001), 0.9)")
