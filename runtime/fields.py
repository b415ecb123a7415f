"""Reading JSON that comes from outside: every value is checked, every complaint names the file and the field."""

from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

from runtime.errors import SpecError

T = TypeVar("T")
_NAMES = {str: "a string", int: "an integer", bool: "true or false", dict: "an object", list: "an array"}


class Fields:
    """One JSON object: typed access by name. `path` is the object's own place, "" at the top."""

    def __init__(self, value: Any, file: str, path: str = "") -> None:
        self._file, self._path = file, path
        if not isinstance(value, dict):
            self.refuse("", "must be an object")
        self.value: dict[str, Any] = value

    def refuse(self, name: str, problem: str, error: type[SpecError] = SpecError) -> NoReturn:
        """Raise a SpecError about the field `name` of this object."""
        place = ".".join(part for part in (self._path, name) if part)
        raise error(f"{self._file}: {place or 'the file'}: {problem}")

    def take(self, name: str, kind: type[T], default: T) -> T:
        """The field's value, or `default` when it is absent or null."""
        value = self.value.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.refuse(name, f"must be {_NAMES[kind]}")
        checked: T = value
        if isinstance(value, str) and "\0" in value:
            self.refuse(name, "must not contain a null character")
        return checked

    def need(self, name: str, kind: type[T]) -> T:
        """The value of a field that must be there."""
        if self.value.get(name) is None:
            self.refuse(name, f"is missing: must be {_NAMES[kind]}")
        return self.take(name, kind, kind())

    def natural(self, name: str, default: int | None = None, *, largest: int = 2**63 - 1) -> int | None:
        """A number from 0 to `largest`."""
        if self.value.get(name) is None:
            return default
        value = self.need(name, int)
        if not 0 <= value <= largest:
            self.refuse(name, f"must be a number from 0 to {largest}")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        """An array of strings; () when absent."""
        value: list[Any] = self.take(name, list, [])
        for index, item in enumerate(value):
            if not isinstance(item, str) or "\0" in item:
                self.refuse(f"{name}[{index}]", "must be a string without null characters")
        return tuple(value)

    def string_map(self, name: str) -> dict[str, str]:
        """An object of strings; {} when absent."""
        value: dict[str, Any] = self.take(name, dict, {})
        for key, item in value.items():
            if not isinstance(item, str) or "\0" in item or "\0" in key:
                self.refuse(f"{name}.{key}", "must be a string without null characters")
        return dict(value)

    def object(self, name: str) -> "Fields":
        """The object in the field `name`; an empty one when absent."""
        value = self.value.get(name)
        return Fields({} if value is None else value, self._file, f"{self._path}.{name}".strip("."))

    def objects(self, name: str) -> Iterator["Fields"]:
        """The objects of an array; nothing when absent."""
        value: list[Any] = self.take(name, list, [])
        for index, item in enumerate(value):
            yield Fields(item, self._file, f"{self._path}.{name}[{index}]".strip("."))

    def unsupported(self, *names: str) -> None:
        """Refuse fields that mean something we do not do; empty ones are harmless."""
        for name in names:
            if self.value.get(name) not in (None, {}, [], "", False):
                from runtime.errors import NotSupported

                self.refuse(name, "is not supported by this version", NotSupported)
