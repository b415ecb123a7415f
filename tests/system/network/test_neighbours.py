"""A neighbour that a container has asked for before its link was connected is asked for again at once."""

import subprocess
import sys

import pytest

# In a network namespace of its own, with a bridge, and one more for the container. The container asks while its link is
# on no bridge, and the kernel itself would not ask again.
_PROGRAM = """
import os, socket, sys
from types import SimpleNamespace
from runtime.network import veth
from runtime.network.announce import Announcer
from runtime.linux.namespaces import inside_netns, new_netns
from runtime.network.netlink import Netlink
from runtime.spec.network import parse

ours, neighbour, family = sys.argv[1:]
number = int(family)
kind = socket.AF_INET if number == 4 else socket.AF_INET6
network = parse(f"bridge=br0,ip={ours},mac=02:00:00:00:00:01", "test")
state = SimpleNamespace(id="test", owner=b"test")
if number == 6:
    for path in ("accept_dad", "dad_transmits"):
        open(f"/proc/sys/net/ipv6/conf/default/{path}", "w").write("0")
netns = new_netns()
with Netlink() as host:
    os.system("ip link add br0 type bridge && ip link set br0 up")
    host.add_address(host.link("br0")["index"], number, neighbour, 24 if number == 4 else 64)
veth.build(state, network, netns)

def speak():
    open(f"/proc/sys/net/ipv{number}/neigh/eth0/retrans_time_ms", "w").write("3600000")
    sock = socket.socket(kind, socket.SOCK_DGRAM)
    sock.sendto(b"hello", (neighbour, 7))
    return sock

kept = inside_netns(netns, speak)
ear = socket.socket(kind, socket.SOCK_DGRAM)
ear.settimeout(10)
ear.bind((neighbour, 7))
announcer = Announcer(network, netns)
veth.attach(state, network)
announcer.send()
announcer.ask()
announcer.repeat()
announcer.close()
print(ear.recv(100).decode())
"""


@pytest.mark.parametrize(
    "arguments", [("10.9.0.1/24", "10.9.0.2", "4"), ("fd09::1/64", "fd09::2", "6")], ids=["ipv4", "ipv6"]
)
def test_what_waits_for_a_neighbour_is_sent(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "hello\n", done.stderr
