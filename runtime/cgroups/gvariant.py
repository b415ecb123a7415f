"""Parse GVariant text (glib, "GVariant Text Format") into D-Bus values, for systemd properties in annotations.

The only other parser is glib's. It needs PyGObject and 6 MB of packages, which a bare target does not have.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Variant = tuple[str, Any]  # D-Bus signature, value

_KEYWORDS = {
    "boolean": "b", "byte": "y", "int16": "n", "uint16": "q", "int32": "i", "uint32": "u", "int64": "x", "uint64": "t",
    "double": "d", "string": "s",
}  # fmt: skip
_RANGES = {
    "y": (0, 2**8), "n": (-(2**15), 2**15), "q": (0, 2**16), "i": (-(2**31), 2**31), "u": (0, 2**32),
    "x": (-(2**63), 2**63), "t": (0, 2**64),
}  # fmt: skip
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


def parse(text: str) -> Variant:
    """Parse a boolean, number, string, or an array of these, with or without a type before it.

    Raises ValueError for other types and for text that is not GVariant.
    """
    variant, rest = _value(text.strip())
    if rest:
        raise ValueError(f"{rest[:40]!r} is left over")
    return variant


def _value(text: str, wanted: str = "") -> tuple[Variant, str]:
    """Parse one value at the beginning of `text`, of the type `wanted` if given. Return it and the rest."""
    word = text.split(maxsplit=1)
    if word and word[0] in _KEYWORDS:
        return _value(text[len(word[0]) :].lstrip(), _KEYWORDS[word[0]])
    if word and word[0].startswith("@"):
        return _value(text[len(word[0]) :].lstrip(), word[0][1:])
    if text.startswith("["):
        return _array(text[1:].lstrip(), wanted)
    if text.startswith(("'", '"')):
        return _string(text, wanted)
    end = next((index for index, letter in enumerate(text) if letter in ",] \t\n"), len(text))
    return _scalar(text[:end], wanted), text[end:].lstrip()


def _array(text: str, wanted: str) -> tuple[Variant, str]:
    if wanted and not (wanted[0] == "a" and wanted[1:] in _KEYWORDS.values()):
        raise ValueError(f"an array of the type {wanted!r} is not supported")
    kind, values = wanted[1:], list[object]()
    while not text.startswith("]"):
        (kind, value), text = _value(text, kind)
        values.append(value)
        if text.startswith(","):
            text = text[1:].lstrip()
        elif not text.startswith("]"):
            raise ValueError("an array does not end")
    if len(kind) != 1:
        raise ValueError("an array of unknown type" if not kind else f"an array of {kind!r} is not supported")
    return (f"a{kind}", values), text[1:].lstrip()


def _string(text: str, wanted: str) -> tuple[Variant, str]:
    if wanted not in ("", "s"):
        raise ValueError(f"a string is not of the type {wanted!r}")
    found: list[str] = []
    letters = iter(enumerate(text[1:], 1))
    for index, letter in letters:
        if letter == text[0]:
            return ("s", "".join(found)), text[index + 1 :].lstrip()
        if letter == "\\":
            _, letter = next(letters, (0, ""))
            if letter not in _ESCAPES:
                raise ValueError(f"the escape \\{letter} is not supported")
            letter = _ESCAPES[letter]
        found.append(letter)
    raise ValueError("a string does not end")


def _scalar(word: str, wanted: str) -> Variant:
    if word in ("true", "false"):
        if wanted not in ("", "b"):
            raise ValueError(f"{word} is not of the type {wanted!r}")
        return "b", word == "true"
    if wanted == "d" or (not wanted and "." in word):
        return "d", float(word)
    kind = wanted or "i"
    if kind not in _RANGES:
        raise ValueError(f"{word!r} is not of the type {kind!r}, or that is not supported")
    number = int(word, 0)
    low, beyond = _RANGES[kind]
    if not low <= number < beyond:
        raise ValueError(f"{number} is out of range")
    return kind, number
