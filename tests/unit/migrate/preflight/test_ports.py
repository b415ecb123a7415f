"""Ports as they come over the wire."""

from typing import Any

import pytest

from migrate.errors import ProtocolError
from migrate.wire import records
from migrate.wire.questions import Bound

GOOD = Bound("tcp", "::", 80, "eth0", reuse_port=True)


def test_a_port_survives_the_wire() -> None:
    assert records.decode(Bound, records.encode(GOOD), "a port") == GOOD


@pytest.mark.parametrize(
    "change",
    [{"protocol": "raw"}, {"port": 0}, {"port": 65536}, {"port": "80"}, {"address": "host"}, {"address": "\0"},
     {"address": "1.2.3.4.5"}, {"device": "x" * 16}, {"free": 1}, {"more": 1}],
)  # fmt: skip
def test_malformed_ports_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        records.decode(Bound, {**records.encode(GOOD), **change}, "a port")
