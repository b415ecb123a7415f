"""Read and write JSON without the regular expressions that `json` imports, which saves every verb 5 ms.

The interpreter's C scanner and encoder do the work. Text that they reject goes to `json` itself, which reports the
error.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

try:
    import _json

    class _Context:
        """The attributes that the scanner reads, with the defaults of json.JSONDecoder."""

        strict = True
        object_hook = object_pairs_hook = None
        parse_float, parse_int = float, int
        parse_constant = float
        memo: dict[str, str] = {}

    _scan: Any = _json.make_scanner(_Context())  # type: ignore[arg-type]
    _encode: Any = _json.make_encoder(
        None, None, _json.encode_basestring_ascii, None, ": ", ", ", False, False, True  # type: ignore[arg-type]
    )  # fmt: skip
except (ImportError, AttributeError, TypeError):  # another interpreter
    _scan = _encode = None

_SPACE = " \t\n\r"


def loads(data: str | bytes) -> Any:
    """Return the value of a JSON text (bytes: UTF-8). Raises ValueError (or RecursionError)."""
    text = data.decode() if isinstance(data, bytes) else data
    if _scan is not None:
        stripped = text.strip(_SPACE)
        try:
            value, end = _scan(stripped, 0)
            if end == len(stripped):
                return value
        except (StopIteration, SystemError):  # SystemError: JSONDecodeError is not defined before `json` is imported
            pass
    import json

    return json.loads(text)


def dumps(value: Any) -> str:
    """Return a value as JSON on one line. Raises TypeError, ValueError."""
    if _encode is not None:
        return "".join(_encode(value, 0))
    import json

    return json.dumps(value)
