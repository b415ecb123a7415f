"""What goes along of a container's log: as much as one call takes, whatever its bytes are."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from migrate.source import settle
from migrate.wire import frames, protocol


@pytest.mark.parametrize("line", [b"text\n", "Zeile \u00e4\u00f6\u00fc\n".encode(), b"\xff\xfe\xfd\n", b"\n"])
def test_a_log_goes_along_whatever_its_bytes_are(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "log").write_bytes(line * (settle.LOG_LIMIT // len(line) + 10))
    text = settle._log_tail(SimpleNamespace(log_path=str(tmp_path / "log")))  # type: ignore[arg-type]
    ((_, payload),) = frames.FrameDecoder().feed(protocol.encode_call(protocol.History(text)))
    assert protocol.decode_call(payload) == protocol.History(text)
    assert len(text) > settle.LOG_LIMIT // 8
    assert set(text.splitlines()) <= {line.decode(errors="replace").rstrip("\n")}
