"""Records (runtime/light/records.py) to JSON and back, for everything that the two ends of a move say to each other.

`encode` trusts its own side. `decode` trusts nothing: a record has exactly the fields of its class, each of its
annotated type and within its bounds, or ProtocolError names the field. Types are str, int, float, bool, Literal of
strings, list, tuple[X, ...], dict[str, X], other records, and Json, which is JSON of no particular shape. A class says
what its types cannot say in `__post_init__`, which raises ProtocolError.

Bounds come with the annotation (`Annotated[int, Range(0, 5)]`, `Annotated[str, Most(10)]`); those that are not named
have the ones below. How much memory a message can take is bounded by the limits of frames.py; the bounds here keep a
value from being absurd. Records nest as their classes do, and Json at most JSON_DEPTH deep.
"""

import functools
import json
import math
import typing
from collections.abc import Callable
from typing import Any

from migrate.errors import ProtocolError
from runtime.light.records import Record

TEXT = 1 << 16  # characters of a string
ITEMS = 10_000  # of a list or an object
NUMBER = 1 << 63
JSON_DEPTH = 20


class Most(Record):
    """The largest length of a string, list or object."""

    length: int


class Range(Record):
    """The smallest and the largest value of a number."""

    low: float
    high: float


class _AnyJson:
    """Marks JSON of no particular shape."""


Json = typing.Annotated[Any, _AnyJson()]
_Reader = Callable[[Any], Any]


class _Misfit(Exception):
    """What is wrong with a value, and `place`: where in the record it is."""

    def __init__(self, problem: str, place: str = "") -> None:
        super().__init__(problem)
        self.problem, self.place = problem, place

    def within(self, place: str) -> "_Misfit":
        """The same, as the value that contains this one sees it."""
        joint = "." if self.place and not self.place.startswith("[") else ""
        return _Misfit(self.problem, f"{place}{joint}{self.place}")


def dumps(value: object) -> bytes:
    """A record, or plain JSON, as the bytes that travel."""
    return json.dumps(encode(value), separators=(",", ":")).encode()


def loads(payload: bytes) -> dict[str, Any]:
    """A JSON object from the wire, its fields not looked at yet. Raises ProtocolError."""
    try:
        value = json.loads(payload, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a message is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolError("a message is not a JSON object")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def encode(value: Any) -> Any:
    """A record as plain JSON: an object with all of its fields."""
    if isinstance(value, Record):
        return {name: encode(getattr(value, name)) for name in value._fields}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


R = typing.TypeVar("R")


def decode(cls: type[R], value: object, what: str) -> R:
    """The record of class `cls` out of decoded JSON. Raises ProtocolError, which begins with `what`."""
    try:
        record: R = _reader(typing.cast(Any, cls))(value)
    except _Misfit as misfit:
        place = f"{misfit.place} " if misfit.place else ""
        raise ProtocolError(f"{what}: {place}{misfit.problem}") from None
    return record


@functools.cache
def _reader(hint: Any) -> _Reader:
    """The function that reads values of an annotated type. Raises TypeError for a type that no record may have."""
    bounds: tuple[Any, ...] = ()
    if typing.get_origin(hint) is typing.Annotated:
        hint, *marks = typing.get_args(hint)
        bounds = tuple(marks)
    most = next((mark.length for mark in bounds if isinstance(mark, Most)), None)
    span = next((mark for mark in bounds if isinstance(mark, Range)), Range(-NUMBER, NUMBER - 1))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if any(isinstance(mark, _AnyJson) for mark in bounds):
        return lambda value: _json(value, JSON_DEPTH)
    if isinstance(hint, type) and issubclass(hint, Record):
        return _record_reader(hint)
    if hint is bool:
        return _bool
    if hint in (int, float):
        return _number_reader(hint, span)
    if hint is str:
        return _text_reader(TEXT if most is None else most)
    if origin is typing.Literal:
        return _literal_reader(inner)
    if origin in (list, tuple):
        return _list_reader(origin, _reader(inner[0]), ITEMS if most is None else most)
    if origin is dict and inner[0] is str:
        return _dict_reader(_reader(inner[1]), ITEMS if most is None else most)
    raise TypeError(f"{hint} is not a type that travels")


def _record_reader(cls: Any) -> _Reader:
    hints = typing.get_type_hints(cls, include_extras=True)
    readers = {name: _reader(hints[name]) for name in cls._fields}

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _Misfit(f"is not of type {cls.__name__}")
        fields = {}
        for name, reader in readers.items():
            if name not in value:
                raise _Misfit("is missing", name)
            try:
                fields[name] = reader(value[name])
            except _Misfit as misfit:
                raise misfit.within(name) from None
        if len(value) != len(readers):
            odd = next(name for name in value if name not in readers)
            raise _Misfit("is not a field that this version knows", _short(odd))
        try:
            return cls(**fields)
        except ProtocolError as error:
            raise _Misfit(str(error)) from None

    return read


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise _Misfit("is not of type bool")
    return value


def _number_reader(kind: type[int] | type[float], span: Range) -> _Reader:
    def read(value: Any) -> Any:
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise _Misfit(f"is not of type {kind.__name__}")
        if not span.low <= value <= span.high or not math.isfinite(value):
            raise _Misfit(f"is {_short(value)}, not between {span.low:g} and {span.high:g}")
        return kind(value)

    return read


def _text_reader(most: int) -> _Reader:
    def read(value: Any) -> str:
        if type(value) is not str:
            raise _Misfit("is not of type str")
        if len(value) > most:
            raise _Misfit(f"has {len(value)} characters, more than {most}")
        return value

    return read


def _literal_reader(words: tuple[str, ...]) -> _Reader:
    def read(value: Any) -> str:
        if type(value) is not str or value not in words:
            raise _Misfit(f"is {_short(value)}, not one of {', '.join(words)}")
        return value

    return read


def _list_reader(kind: type, reader: _Reader, most: int) -> _Reader:
    def read(value: Any) -> Any:
        if type(value) is not list:
            raise _Misfit("is not of type list")
        if len(value) > most:
            raise _Misfit(f"has {len(value)} items, more than {most}")
        found = []
        for number, item in enumerate(value):
            try:
                found.append(reader(item))
            except _Misfit as misfit:
                raise misfit.within(f"[{number}]") from None
        return kind(found)

    return read


def _dict_reader(reader: _Reader, most: int) -> _Reader:
    def read(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise _Misfit("is not of type dict")
        if len(value) > most:
            raise _Misfit(f"has {len(value)} items, more than {most}")
        found = {}
        for name, item in value.items():
            if len(name) > TEXT:
                raise _Misfit(f"has a name of {len(name)} characters, more than {TEXT}")
            try:
                found[name] = reader(item)
            except _Misfit as misfit:
                raise misfit.within(f"[{_short(name)}]") from None
        return found

    return read


def _json(value: Any, depth: int) -> Any:
    """Check JSON of no particular shape, which comes as it is."""
    if not depth:
        raise _Misfit(f"is nested more than {JSON_DEPTH} deep")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _json(item, depth - 1)
    return value


def _short(value: object) -> str:
    return ascii(value)[:40]
