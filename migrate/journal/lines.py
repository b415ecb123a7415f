"""The lines of a journal as bytes. Each has a checksum, so that damage is detected.

A line is JSON, {"time": ..., "phase": ..., ..., "crc": "xxxxxxxx"}: the last field is the CRC-32 of the line without
it. In format 2, which the first line names, every line has one. In earlier formats only the lines that this version has
added have one.

Only bytes that end with a newline are a line. The rest was torn by a power cut, and was never reported as written.
"""

import json
import re
import zlib
from typing import Any

FORMAT = 2
_CRC = re.compile(rb', "crc": "([0-9a-f]{8})"\}')
_CRC_LENGTH = len(', "crc": "00000000"}')


def encode(fields: dict[str, Any]) -> bytes:
    """Return one line with its newline."""
    text = json.dumps(fields).encode()
    return b'%s, "crc": "%08x"}\n' % (text[:-1], zlib.crc32(text))


def torn(data: bytes) -> int:
    """Return how many bytes at the end belong to a line that was not written whole."""
    return len(data) - (data.rfind(b"\n") + 1)


def decode(data: bytes) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Return the whole lines of a journal as JSON objects, and (line number, reason) of each damaged one."""
    found: list[dict[str, Any]] = []
    damage: list[tuple[int, str]] = []
    lines = data.split(b"\n")[:-1]
    first = _decode(lines[0], strict=False)[0] if lines else None
    version = (first or {}).get("format", 1)
    if version not in (1, FORMAT):
        return [], [(1, f"has format {str(version)[:20]}, which this version does not know")]
    for number, line in enumerate(lines, 1):
        value, reason = _decode(line, strict=version == FORMAT)
        if not line:
            continue
        if value is not None:
            found.append(value)
        elif version == FORMAT or reason != _NOT_JSON:  # earlier versions began a new line after a torn one
            damage.append((number, reason))
    return found, damage


_NOT_JSON = "is not a JSON object"


def _decode(line: bytes, *, strict: bool) -> tuple[dict[str, Any] | None, str]:
    text, checksum = line[:-_CRC_LENGTH] + b"}", _CRC.fullmatch(line[-_CRC_LENGTH:])
    if checksum is None:
        if strict:
            return None, "has no checksum"
        text = line
    elif b"%08x" % zlib.crc32(text) != checksum[1]:
        return None, "has a wrong checksum"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None, _NOT_JSON
    return (value, "") if isinstance(value, dict) else (None, _NOT_JSON)
