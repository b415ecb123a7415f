"""Read JSON from outside: every value is validated, and every error names the file and the field."""

from __future__ import annotations

from runtime.errors import NotSupported, SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn, TypeVar

    T = TypeVar("T")

_NAMES = {str: "a string", int: "an integer", bool: "true or false", dict: "an object", list: "an array"}


class Fields:
    """One JSON object with typed access by name. `path` is the object's place in the file, "" at the top."""

    def __init__(self, value: Any, file: str, path: str = "") -> None:
        self._file, self._path = file, path
        if not isinstance(value, dict):
            self.refuse("", "must be an object")
        self.value: dict[str, Any] = value

    def refuse(self, name: str, problem: str, error: type[SpecError] = SpecError) -> NoReturn:
        """Raise a SpecError about the field `name` of this object."""
        # A key may hold anything: it must neither break the line nor reach a terminal as a command.
        place = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in self.place(name)[:200])
        raise error(f"{self._file}: {place or 'the file'}: {problem}")

    def place(self, name: str = "") -> str:
        """Return the path in the file of the field `name`, or of this object if that is ""."""
        return ".".join(part for part in (self._path, name) if part)

    def has(self, name: str) -> bool:
        """Return whether the field exists and is not null."""
        return self.value.get(name) is not None

    def take(self, name: str, kind: type[T], default: T) -> T:
        """Return the field's value, `default` if it is absent or null."""
        value = self.value.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.refuse(name, f"must be {_NAMES[kind]}")
        checked: T = value
        if isinstance(value, str):
            self._check_text(name, value)
        return checked

    def need(self, name: str, kind: type[T]) -> T:
        """Return the value of a required field."""
        if not self.has(name):
            self.refuse(name, f"is missing: must be {_NAMES[kind]}")
        return self.take(name, kind, kind())

    def natural(self, name: str, default: int | None = None, *, largest: int = 2**63 - 1) -> int | None:
        """Return a number from 0 to `largest`."""
        return self.number(name, default, smallest=0, largest=largest)

    def number(self, name: str, default: int | None = None, *, smallest: int, largest: int) -> int | None:
        """Return a number from `smallest` to `largest`."""
        if not self.has(name):
            return default
        value = self.need(name, int)
        if not smallest <= value <= largest:
            self.refuse(name, f"must be a number from {smallest} to {largest}")
        return value

    def choice(self, name: str, allowed: tuple[str, ...] | dict[str, Any], default: str = "") -> str:
        """Return a string that is one of `allowed`; `default` if it is absent or empty."""
        value = self.take(name, str, "")
        if value and value not in allowed:
            self.refuse(name, f"must be one of {', '.join(allowed)}, not {value!r}")
        return value or default

    def strings(self, name: str) -> tuple[str, ...]:
        """Return an array of strings; () if it is absent."""
        value: list[Any] = self.take(name, list, [])
        for index, item in enumerate(value):
            if not isinstance(item, str):
                self.refuse(f"{name}[{index}]", "must be a string")
            self._check_text(f"{name}[{index}]", item)
        return tuple(value)

    def string_map(self, name: str) -> dict[str, str]:
        """Return an object of strings; {} if it is absent."""
        value: dict[str, Any] = self.take(name, dict, {})
        for key, item in value.items():
            if not isinstance(item, str):
                self.refuse(f"{name}.{key}", "must be a string")
            self._check_text(f"{name}.{key}", key + item)
        return dict(value)

    def paths(self, name: str) -> tuple[str, ...]:
        """Return an array of absolute paths without `..`."""
        for index, path in enumerate(self.strings(name)):
            self.check_path(f"{name}[{index}]", path)
        return self.strings(name)

    def check_path(self, name: str, path: str) -> str:
        """Return a path inside the container; raise SpecError if it is relative or contains `..`."""
        if not path.startswith("/") or ".." in path.split("/"):
            self.refuse(name, "must be an absolute path without ..")
        return path

    def object(self, name: str) -> Fields:
        """Return the object in the field `name`; an empty one if it is absent."""
        value = self.value.get(name)
        return Fields({} if value is None else value, self._file, self.place(name))

    def objects(self, name: str) -> Iterator[Fields]:
        """Yield the objects of an array; nothing if it is absent."""
        value: list[Any] = self.take(name, list, [])
        for index, item in enumerate(value):
            yield Fields(item, self._file, self.place(f"{name}[{index}]"))

    def unsupported(self, *names: str) -> None:
        """Raise NotSupported for fields that this version does not support, unless they are empty."""
        for name in names:
            if self.value.get(name) not in (None, {}, [], "", False):
                self.refuse(name, "is not supported", NotSupported)

    def _check_text(self, name: str, text: str) -> None:
        """Raise SpecError for text that the kernel cannot take as a C string in UTF-8."""
        if "\0" in text or not (text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)):
            self.refuse(name, "must be a string without null characters and lone surrogates")
