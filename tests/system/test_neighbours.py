"""A neighbour that a container has asked for before its link was connected is asked for again at once."""

import subprocess
import sys

import pytest

# In a network namespace of its own: one more for the container, with a pair between them. The other end gets its
# address, and so can answer, after the container has asked; and the kernel itself would not ask again.
_PROGRAM = """
import os, socket, sys
from runtime.announce import Announcer
from runtime.namespaces import inside_netns, new_netns
from runtime.netlink import Netlink
from runtime.network import parse
from runtime.veth import _set_up_inside

ours, neighbour, family = sys.argv[1:]
number = int(family)
kind = socket.AF_INET if number == 4 else socket.AF_INET6
network = parse(f"bridge=none,ip={ours},mac=02:00:00:00:00:01", "test")
netns = new_netns()
with Netlink() as host:
    host.add_veth("host", "eth0", netns, mac=network.mac)
    index = host.link("host")["index"]
    for path in (f"ipv{number}/conf/host/accept_dad", f"ipv{number}/conf/host/dad_transmits"):
        if os.path.exists("/proc/sys/net/" + path):
            open("/proc/sys/net/" + path, "w").write("0")
    host.set_link(index, up=True)
    def speak():
        _set_up_inside(network)
        open(f"/proc/sys/net/ipv{number}/neigh/eth0/retrans_time_ms", "w").write("3600000")
        sock = socket.socket(kind, socket.SOCK_DGRAM)
        sock.sendto(b"hello", (neighbour, 7))
        return sock
    kept = inside_netns(netns, speak)
    host.add_address(index, number, neighbour, 24 if number == 4 else 64)
    ear = socket.socket(kind, socket.SOCK_DGRAM)
    ear.settimeout(10)
    ear.bind((neighbour, 7))
    announcer = Announcer(network, netns)
    announcer.ask()
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
