"""Sockets inside a container: what `validate` says of each kind, and what real CRIU then makes of it."""

import contextlib
import json
import socket
import textwrap
import time
from pathlib import Path

import pytest

from tests.support.boxes import PATIENCE
from tests.support.pybox import write_python_bundle
from tests.system.conftest import Local

pytestmark = pytest.mark.system

# What stands before `rest()` happens before the dump, what stands behind it after the restore.
_BEFORE = """
import ctypes, os, socket, struct, sys, time
libc = ctypes.CDLL(None)
def rest():
    print("ready")
    while not os.path.exists("/tmp/go"):
        time.sleep(0.01)
def attempt(function, *args):
    try:
        return function(*args)
    except OSError as error:
        return type(error).__name__
def pair(backlog=8):
    listener = socket.create_server(("127.0.0.1", 5000), backlog=backlog)
    client = socket.create_connection(("127.0.0.1", 5000))
    client.settimeout(5)
    return listener, client, listener.accept()[0]
"""


class Box:
    """A container whose program is Python."""

    def __init__(self, pymigrate: Local, place: Path) -> None:
        self._pymigrate, self._bundle, self._images = pymigrate, place / "bundle", place / "images"
        self.id = f"conn-{place.name}"

    def start(self, program: str, mounts: tuple[dict[str, object], ...] = ()) -> None:
        write_python_bundle(self._bundle, _BEFORE + textwrap.dedent(program))
        config = json.loads((self._bundle / "config.json").read_text())
        config["linux"]["cgroupsPath"] = f"/pymigrate/{self.id}"
        config["mounts"] += mounts
        (self._bundle / "config.json").write_text(json.dumps(config))
        self._pymigrate("run", "-d", "-b", self._bundle, self.id)
        self.wait("ready")

    def wait(self, word: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            text = self._pymigrate("logs", self.id).stdout
            if word in text.split():
                return text
            assert "Traceback" not in text, text
        raise AssertionError(f"{word} was not written: {text}")

    def blockers(self) -> dict[str, str]:
        """Rule -> where and what, of all that `validate` finds."""
        done = self._pymigrate("--json", "validate", self.id, check=False)
        return {entry["rule"]: f"{entry['where']}: {entry['problem']}" for entry in json.loads(done.stdout)["blockers"]}

    def dump(self, *flags: str) -> str:
        """What CRIU says to a dump, "" when it does it."""
        argv = ("checkpoint", "--image-path", self._images, "--tcp-established", "--leave-running", *flags, self.id)
        done = self._pymigrate(*argv, check=False)
        return done.stderr if done.returncode else ""

    def restore(self) -> str:
        """What CRIU says to a restore, "" when it does it."""
        self._pymigrate("delete", "-f", self.id)
        argv = ("restore", "-d", "--image-path", self._images, "-b", self._bundle, "--tcp-established", self.id)
        done = self._pymigrate(*argv, check=False)
        return done.stderr if done.returncode else ""

    def go(self) -> str:
        """What the program writes once it runs again."""
        Path(f"/proc/{self._pymigrate.state(self.id)['pid']}/root/tmp/go").touch()
        return self.wait("end")


@pytest.fixture
def box(pymigrate: Local, tmp_path: Path) -> Box:
    return Box(pymigrate, tmp_path)


REFUSED = {
    "vsock": ("s = socket.socket(socket.AF_VSOCK)", "socket-kind", "AF_VSOCK", "Unknown socket"),
    "xdp": ("s = socket.socket(44, socket.SOCK_RAW)", "socket-kind", "AF_XDP", "Unknown socket"),
    "mptcp": ("s = socket.socket(proto=262)", "socket-kind", "Multipath TCP", "Unsupported proto 262"),
    "netns": (
        """
        here = os.open("/proc/self/ns/net", 0)
        assert libc.unshare(0x40000000) == 0
        s = socket.create_server(("0.0.0.0", 80))
        assert libc.setns(here, 0) == 0
        os.close(here)
        """,
        "socket-namespace", "tcp 0.0.0.0:80", "external network namespace",
    ),
    "ebpf": (
        """
        code = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xb7, 0, 0, -1, 0x95, 0, 0, 0))
        license = ctypes.create_string_buffer(b"GPL")
        attr = struct.pack("=IIQQ96x", 1, 2, ctypes.addressof(code), ctypes.addressof(license))
        program = libc.syscall(321, 5, ctypes.create_string_buffer(attr), len(attr))
        assert program > 0
        s = socket.socket(type=socket.SOCK_DGRAM)
        s.setsockopt(socket.SOL_SOCKET, 50, program)
        os.close(program)
        """,
        "socket-filter", "udp 0.0.0.0:0", "socket filter",
    ),
    "backlog": (
        """
        s = socket.create_server(("127.0.0.1", 5000))
        c = socket.create_connection(("127.0.0.1", 5000))
        """,
        "tcp-backlog", "tcp 127.0.0.1:5000 has 1 connection not accepted", "In-flight connection",
    ),
    "cork": (
        """
        s = socket.socket(type=socket.SOCK_DGRAM)
        s.connect(("127.0.0.1", 6000))
        s.setsockopt(socket.IPPROTO_UDP, 1, 1)
        """,
        "udp-cork", "-> 127.0.0.1:6000", "corked",
    ),
    "netlink": (
        """
        s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        s.send(struct.pack("=IHHIIB3x", 20, 18, 0x301, 1, 0, 0))
        """,
        "netlink", "unread messages", "has data to read",
    ),
    "groups": (
        """
        s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        s.bind((0, 0))
        s.setsockopt(270, 1, 33)
        """,
        "netlink", "groups above 32", "more than 32 groups",
    ),
    "credentials": (
        """
        a, b = socket.socketpair()
        b.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        a.send(b"unread")
        """,
        "unix-message", "unread", "Control messages in queue",
    ),
    "unix-data": (
        """
        s = socket.socket(socket.AF_UNIX)
        s.bind("/tmp/s")
        s.listen()
        c = socket.socket(socket.AF_UNIX)
        c.connect("/tmp/s")
        c.send(b"early")
        """,
        "unix-backlog", "unix /tmp/s has a connection with data", "Non-empty write queue",
    ),
    "unix-closed": (
        """
        s = socket.socket(socket.AF_UNIX)
        s.bind("\\0abstract")
        s.listen()
        c = socket.socket(socket.AF_UNIX)
        c.connect("\\0abstract")
        c.close()
        """,
        "unix-backlog", "unix @abstract has a connection that was closed", "closed in-flight socket",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_criu_does_not_dump_is_found_before(box: Box, name: str) -> None:
    program, rule, words, criu = REFUSED[name]
    box.start(textwrap.dedent(program) + "\nrest()")
    found = box.blockers()
    assert set(found) == {rule}
    assert words in found[rule]
    assert "(python3), descriptor " in found[rule]
    assert criu in box.dump()


@pytest.mark.parametrize("accepted", [True, False])
def test_a_connection_to_a_socket_of_the_host_is_found(box: Box, tmp_path: Path, accepted: bool) -> None:
    (tmp_path / "run").mkdir()
    mount = {"destination": "/mnt", "type": "none", "source": str(tmp_path / "run"), "options": ["bind"]}
    with socket.socket(socket.AF_UNIX) as outside, contextlib.ExitStack() as stack:
        outside.bind(str(tmp_path / "run" / "s"))
        outside.listen()
        box.start('s = socket.socket(socket.AF_UNIX)\ns.connect("/mnt/s")\nrest()', (mount,))
        if accepted:
            stack.enter_context(outside.accept()[0])
        found = box.blockers()
        assert set(found) == {"unix-peer", "volume"}
        assert "outside the container" in found["unix-peer"]
        assert ("External socket" if accepted else "Dangling connection") in box.dump()


def test_a_connection_that_is_being_made_may_not_be_restored(box: Box) -> None:
    # CRIU connects anew. When the answer comes at once, as over loopback, it depends on a number of the kernel's that
    # is made of addresses and ports whether CRIU can cope: so there are many.
    box.start(
        """
        held = []
        for port in range(5000, 5020):
            held.append(socket.create_server(("127.0.0.1", port), backlog=0))
            for _ in range(3):
                held.append(socket.socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                held[-1].connect_ex(("127.0.0.1", port))
        rest()
        """
    )
    found = box.blockers()
    assert set(found) == {"tcp-connecting", "tcp-backlog"}
    assert "-> 127.0.0.1:50" in found["tcp-connecting"]
    assert box.dump("--tcp-skip-in-flight") == ""
    assert "Unable to set window parameters" in box.restore()


LOST = {
    "multicast": (
        """
        s = socket.socket(type=socket.SOCK_DGRAM)
        s.bind(("0.0.0.0", 6000))
        s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("224.1.2.3") + bytes([127, 0, 0, 1]))
        rest()
        print("member" if "030201E0" in open("/proc/net/igmp").read() else "lost")
        """,
        "multicast", "udp 0.0.0.0:6000 has joined the group 224.1.2.3",
    ),
    "multicast6": (
        """
        s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        group = socket.inet_pton(socket.AF_INET6, "ff05::7") + struct.pack("=I", 1)
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
        rest()
        print("member" if "ff0500000000" in open("/proc/net/igmp6").read() else "lost")
        """,
        "multicast", "has joined the group ff05::7",
    ),
    "closed": (
        """
        listener, client, server = pair()
        server.setblocking(False)
        while attempt(server.send, bytes(100000)) != "BlockingIOError":
            pass
        server.close()
        rest()
        ends = []
        while not ends:
            got = attempt(client.recv, 1 << 20)
            if not got or isinstance(got, str):
                ends.append(got)
        print("lost" if ends == ["ConnectionResetError"] else ends)
        """,
        "tcp-closing", "tcp 127.0.0.1:5000 -> 127.0.0.1:",
    ),
    "md5": (
        """
        def key(s):
            text = struct.pack("=H2s4s120sBBHI80s", 2, b"", bytes([127, 0, 0, 1]), b"", 0, 0, 3, 0, b"key")
            s.setsockopt(socket.IPPROTO_TCP, 14, text)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 5000))
        key(listener)
        listener.listen()
        client = socket.socket()
        key(client)
        client.connect(("127.0.0.1", 5000))
        server, _ = listener.accept()
        rest()
        other = socket.socket()
        other.settimeout(1)
        print("lost" if attempt(other.connect, ("127.0.0.1", 5000)) is None else "kept")
        """,
        "tcp-option", "TCP_MD5SIG",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_what_criu_loses_without_a_word_is_found(box: Box, name: str) -> None:
    program, rule, words = LOST[name]
    box.start(textwrap.dedent(program) + 'print("end")')
    found = box.blockers()
    assert set(found) == {rule}
    assert words in found[rule]
    assert box.dump("--tcp-skip-in-flight") == ""
    assert box.restore() == ""
    assert "lost" in box.go().split()


CARRIED = {
    "tcp": (
        """
        listener, client, server = pair()
        client.sendall(b"unread")
        server.sendall(bytes(100000))
        client.shutdown(socket.SHUT_WR)
        rest()
        print(server.recv(100), server.recv(100))
        server.close()
        print(sum(map(len, iter(lambda: client.recv(1 << 16), b""))))
        """,
        "b'unread' b''\n100000\n",
    ),
    "udp": (
        """
        s = socket.socket(type=socket.SOCK_DGRAM)
        s.bind(("127.0.0.1", 6000))
        c = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        c.bind(("::1", 0))
        d = socket.socket(type=socket.SOCK_DGRAM)
        d.connect(("127.0.0.1", 6000))
        s.connect(d.getsockname())
        rest()
        d.send(b"one")
        print(s.recv(10))
        s.send(b"two")
        print(d.recv(10), c.getsockname()[0])
        """,
        "b'one'\nb'two' ::1\n",
    ),
    "unix-stream": (
        """
        a, b = socket.socketpair()
        a.send(b"unread")
        socket.send_fds(a, [b"with"], [os.open("/etc", os.O_RDONLY)])
        a.shutdown(socket.SHUT_WR)
        rest()
        data, fds, _, _ = socket.recv_fds(b, 100, 5)
        print(data, os.readlink(f"/proc/self/fd/{fds[0]}"), b.recv(10))
        b.send(b"back")
        print(a.recv(10))
        """,
        "b'unreadwith' /etc b''\nb'back'\n",
    ),
    "unix-waiting": (
        """
        s = socket.socket(socket.AF_UNIX)
        s.bind("/tmp/s")
        s.listen()
        c = socket.socket(socket.AF_UNIX)
        c.connect("/tmp/s")
        rest()
        a, _ = s.accept()
        c.send(b"late")
        print(a.recv(10))
        """,
        "b'late'\n",
    ),
    "unix-packets": (
        """
        s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        s.bind("\\0abstract")
        s.listen()
        c = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        c.connect("\\0abstract")
        a, _ = s.accept()
        c.send(b"1")
        c.send(b"22")
        c.close()
        d = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        d.bind("/tmp/d")
        e = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        e.connect("/tmp/d")
        e.send(b"a")
        e.send(b"bb")
        rest()
        print(a.recv(10), a.recv(10), a.recv(10), d.recv(10), d.recv(10))
        c = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        c.connect("\\0abstract")
        e.send(b"c")
        print(d.recv(10))
        """,
        "b'1' b'22' b'' b'a' b'bb'\nb'c'\n",
    ),
    "raw": (
        """
        r = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        p = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300)
        p.bind(("lo", 3))
        n = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        n.bind((0, 1))
        rest()
        for s in r, p, n:
            s.settimeout(5)
        r.sendto(bytes([8, 0, 0xf7, 0xff, 0, 0, 0, 0]), ("127.0.0.1", 0))
        print(len(r.recv(100)), len(p.recv(100)))
        n.send(struct.pack("=IHHIIB3x", 20, 18, 0x301, 1, 0, 0))
        print(len(n.recv(10000)) > 20)
        """,
        "28 42\nTrue\n",
    ),
}


@pytest.mark.parametrize("name", CARRIED)
def test_what_is_not_refused_survives(box: Box, name: str) -> None:
    program, output = CARRIED[name]
    box.start(textwrap.dedent(program) + 'print("end")')
    assert box.blockers() == {}
    assert box.dump() == ""
    assert box.restore() == ""
    assert box.go() == output + "end\n"


def test_unread_datagrams_are_dropped_as_the_manual_says(box: Box) -> None:
    """UDP promises no delivery: docs/network.md says that a move is one of the occasions."""
    box.start(
        """
        s = socket.socket(type=socket.SOCK_DGRAM)
        s.bind(("127.0.0.1", 6000))
        c = socket.socket(type=socket.SOCK_DGRAM)
        c.connect(("127.0.0.1", 6000))
        c.send(b"before")
        rest()
        c.send(b"after")
        print(s.recv(10), "end")
        """
    )
    assert box.blockers() == {}
    assert (box.dump(), box.restore()) == ("", "")
    assert "b'after' end" in box.go()
