"""Descriptors whose open file another program has made non-blocking."""

import os
import threading

from runtime.linux.descriptors import read_some, write_all


def test_a_call_waits_where_it_would_block() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    text = os.urandom(1 << 20)
    writing = threading.Thread(target=lambda: (write_all(writer, text), os.close(writer)))
    got = bytearray()
    reading = threading.Thread(target=lambda: _drain(reader, got))
    reading.start()
    writing.start()
    for thread in (reading, writing):
        thread.join(10)
        assert not thread.is_alive()
    assert got == text
    os.close(reader)


def _drain(fd: int, into: bytearray) -> None:
    while data := read_some(fd, 1 << 12):
        into += data
