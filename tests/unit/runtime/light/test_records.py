"""Frozen records without generated code."""

from typing import ClassVar, Generic, TypeVar

import pytest

from runtime.light.records import Record

T = TypeVar("T")


class Named(Record, Generic[T]):
    kind: ClassVar[str] = "named"


class Box(Named[int]):
    name: str
    items: list[int] = []
    size: int = 0

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"{self.name} is smaller than nothing")


class Other(Named[int]):
    name: str
    items: list[int] = []
    size: int = 0


def test_records_are_equal_by_class_and_fields() -> None:
    assert Box("a", size=2) == Box("a", [], 2) != Box("a")
    assert Box("a") != Other("a")


def test_a_class_variable_is_not_a_field() -> None:
    assert Box._fields == ("name", "items", "size")
    with pytest.raises(TypeError, match="unknown field kind"):
        Box("a", kind="b")  # type: ignore[call-arg]


def test_a_mutable_default_is_not_shared() -> None:
    first = Box("a")
    first.items.append(1)
    assert Box("a").items == []


def test_post_init_checks_what_init_and_replace_are_given() -> None:
    with pytest.raises(ValueError, match="a is smaller"):
        Box("a", size=-1)
    with pytest.raises(ValueError, match="a is smaller"):
        Box("a").replace(size=-1)


def test_fields_cannot_be_set() -> None:
    with pytest.raises(AttributeError, match="frozen"):
        Box("a").size = 1  # type: ignore[misc]
