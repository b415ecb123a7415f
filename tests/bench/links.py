"""Links between the hosts of a lab: as fast as the machine, or shaped."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from migrate.lab import model
from migrate.paths import LAB
from tests.bench.ways import SOURCE, TARGET
from tests.system.conftest import Lab

_TOP = Path(__file__).resolve().parents[2]
_PATIENCE = 20.0  # seconds for a command, and for the relay to begin and to end
_PORT, _NEAR, _FAR = "port1", "relay0", "relay1"  # links in the switch: the source's, and the relay's to the bridge


@dataclass(frozen=True)
class Link:
    """`rate`: bits per second in each direction, 0 for no limit; `delay`: seconds for a round trip, in addition.

    `largest`: MiB of the largest container that is moved over it, because larger ones would take too long.
    """

    key: str
    title: str
    rate: int
    delay: float
    largest: int


LINKS = (
    Link("unshaped", "unshaped", 0, 0.0, 1 << 20),
    Link("1g", "1 Gbit/s, 1 ms", 10**9, 0.001, 1024),
    Link("100m", "100 Mbit/s, 20 ms", 10**8, 0.020, 256),
)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(argv)}: {done.stderr.strip()}")


@contextlib.contextmanager
def lab(name: str, link: Link) -> Iterator[Lab]:
    """A lab whose two hosts have this link. It is removed at the end, also after Ctrl-C and SIGTERM."""
    made = Lab(name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ending())
        stack.callback(_down, made)
        made.up()
        if link.rate:
            # Shaped where frames are made, so that a sender waits and no frame is lost.
            burst = max(link.rate // 8 // 250, 1 << 17)
            for host in (SOURCE, TARGET):
                made.sh(host, f"tc qdisc add dev eth0 root tbf rate {link.rate} burst {burst} latency 50ms")
        if link.delay:
            stack.enter_context(_delayed(made, link.delay))
        yield made


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Have SIGTERM end this process as Ctrl-C does: by an exception, so that everything is removed."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _down(made: Lab) -> None:
    """Take the lab down, and do not let a second Ctrl-C stop that."""
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        made.lab("down")
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _delayed(made: Lab, delay: float) -> Iterator[None]:
    """Put a relay between the source's port and the bridge of the switch: a round trip takes `delay` seconds more."""
    switch = int((LAB / made.name / "switch.pid").read_text())
    inside = ["nsenter", f"--net=/proc/{switch}/ns/net"]
    assert model.find(made.name, SOURCE).number == 1  # its port is _PORT
    _run(*inside, "ip", "link", "add", _NEAR, "type", "veth", "peer", "name", _FAR)
    _run(*inside, "ip", "link", "set", _PORT, "nomaster")
    _run(*inside, "ip", "link", "set", _NEAR, "up")
    _run(*inside, "ip", "link", "set", _FAR, "master", "br0", "up")
    for link in (_PORT, _NEAR):
        _run(*inside, "ip", "link", "set", link, "promisc", "on")
    command = [sys.executable, "-m", "tests.bench.relay", str(delay / 2), _PORT, _NEAR]
    relay = subprocess.Popen(
        [*inside, *command], cwd=_TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert relay.stdin is not None
    assert relay.stdout is not None
    try:
        if relay.stdout.readline() != "relaying\n":
            raise SystemExit(f"bench: the relay did not begin: {relay.communicate(timeout=_PATIENCE)[1].strip()}")
        yield
        if relay.poll() is not None:
            raise SystemExit(f"bench: the relay ended: {relay.communicate(timeout=_PATIENCE)[1].strip()}")
    finally:
        relay.stdin.close()
        try:
            relay.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            relay.kill()
            relay.wait()
        relay.stdout.close()
        relay.stderr.close()  # type: ignore[union-attr]
