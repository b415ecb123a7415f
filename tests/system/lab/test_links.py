"""Links of benchmarks that are as slow as they say."""

import os
import time

from tests.bench import links

_SIZE = 10_000_000  # bytes
_MEASURE = """
import socket, sys, time
began = time.monotonic()
sock = socket.create_connection((sys.argv[1], 22), timeout=60)
print(time.monotonic() - began)
"""


def test_a_link_delays_and_limits_and_nothing_stays() -> None:
    link = next(link for link in links.LINKS if link.key == "100m")
    name = f"links-{os.getpid()}"
    with links.lab(name, link) as lab:
        trip = float(lab.on("host1", "python3", "-c", _MEASURE, "host2").stdout)
        assert link.delay <= trip < 5 * link.delay
        began = time.monotonic()
        assert lab.sh("host1", f"head -c {_SIZE} /dev/zero | ssh host2 wc -c").strip() == str(_SIZE)
        took = time.monotonic() - began
        assert _SIZE * 8 / link.rate * 0.9 <= took < 10
    assert not (links.LAB / name).exists()
