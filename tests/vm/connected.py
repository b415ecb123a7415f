"""A container on the machines' bridges whose connections, and whose files, must not miss anything."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from typing import Any

from tests.support.hosts import Hosts
from tests.vm.images import ADDRESSES
from tests.workloads import bundle

PEER = ADDRESSES["host1"]
OWN = ("10.77.0.50", "fd77::50")
HELD = 8 << 20  # bytes of memory that never change
# Beside the server something writes into the root file system.
_PROGRAM = """
n=0
while :; do n=$((n+1)); echo $n >> /written; usleep 100000; done &
exec /usr/bin/python3 -I -S -u -c '
import os, sys
held = os.urandom(int(sys.argv.pop(1)))
exec(open("/programs/net_server.py").read())' "$@"
"""


def config() -> dict[str, Any]:
    """Top-level fields of its config.json."""
    value = bundle.checkers()
    value["process"]["args"] = ["sh", "-c", _PROGRAM, "sh", str(HELD), PEER]
    value["root"]["readonly"] = False
    value["annotations"] = {"io.pymigrate.net": f"bridge=br0,ip={OWN[0]}/24,ip={OWN[1]}/64"}
    return value


class Client:
    """Programs at host1 that it is connected with."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def wait_connected(self) -> None:
        assert self.line() == "ready"

    def end(self) -> None:
        """Nothing may have been lost of what went over the connections."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        for stream in json.loads(self.line()):
            print("client:", stream)
            assert (stream["error"], stream["echoed"]) == ("", stream["sent"]), stream
            assert stream["sent"] > 20


@contextlib.contextmanager
def client(hosts: Hosts) -> Iterator[Client]:
    """Ready for a container that is to be started, and asked in the end."""
    program = (bundle.PROGRAMS / "net_client.py").read_text()
    argv = ("env", "PERIOD=0.1", "python3", "-c", program, PEER, *OWN)
    process = hosts.start("host1", *argv, stdin=subprocess.PIPE)
    try:
        found = Client(process)
        assert found.line() == "listening"
        yield found
        found.end()
    finally:
        process.kill()
        process.communicate()


def assert_in_order(hosts: Hosts, host: str) -> None:
    """What was echoed over the container's own connection, and what it has written."""
    hosts.wait_count(host, hosts.count(host) + 20)
    written = [int(line) for line in hosts.on(host, "pymigrate", "exec", "web", "cat", "/written").stdout.split()]
    for numbers in (hosts.numbers(host), written):
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert written[0] == 1


def interfaces(hosts: Hosts, host: str) -> list[str]:
    """Those of containers: all that are there but the host's own. They are on the bridge."""
    there, ports = hosts.sh(host, "ls /sys/class/net; echo; ls /sys/class/net/br0/brif").split("\n\n")
    found = sorted(set(there.split()) - {"lo", "eth0", "eth1", "br0"})
    assert sorted(ports.split()) == sorted(["eth1", *found])
    return found
