"""CRIU's images as a source of memory: every block is verified, and nothing of a damaged one is used."""

import ctypes
import os
from pathlib import Path

import pytest

from criu_rpc.errors import CriuError
from criu_rpc.pagemap import LAZY, PRESENT, Entry, Pagemap, write
from migrate.memory import block_digests, image_source
from migrate.memory.image_source import ImageSource, Run
from migrate.memory.layout import BLOCK, PAGE
from migrate.memory.sources import Unreadable

LAZY_START = 0x7000_0000_0000
PAGES = 2 * BLOCK // PAGE + 3  # of lazy memory; one page that is not lazy precedes it in the file
DATA = b"".join(number.to_bytes(PAGE, "little") for number in range(1, PAGES + 2))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "pages-3.img").write_bytes(DATA)
    (tmp_path / "pagemap-7.img").write_bytes(bytes(8))
    put(tmp_path, [Entry(PAGE, 1, PRESENT), Entry(LAZY_START, PAGES, PRESENT | LAZY)])
    return tmp_path


def put(images: Path, entries: list[Entry]) -> None:
    directory = os.open(images, os.O_RDONLY)
    try:
        write(directory, "pagemap-7.img", Pagemap(3, entries))
    finally:
        os.close(directory)


def spaces(images: Path) -> dict[int, image_source.Space]:
    directory = os.open(images, os.O_RDONLY)
    try:
        return image_source.read(directory)
    finally:
        os.close(directory)


def source(images: Path) -> ImageSource:
    with (images / "pages-3.img").open("rb") as file:
        digests = b"".join(block_digests.read(file))
    info = (images / "pages-3.img").stat()
    fd = os.open(images / "pages-3.img", os.O_RDONLY)
    files = [image_source._File("pages-3.img", 0, info.st_size, fd)]
    runs = {7: image_source._Runs.of(spaces(images)[7], 0)}
    return ImageSource(str(images), files, runs, digests)


def test_where_the_memory_is(images: Path) -> None:
    name, runs = spaces(images)[7]
    size = PAGES * PAGE
    assert (name, runs) == ("pages-3.img", [Run(PAGE, PAGE, 0, False), Run(LAZY_START, size, PAGE, True)])
    assert image_source.lazy_bytes(spaces(images)) == size
    assert image_source.eager_blocks(spaces(images)) == {"pages-3.img": {0}}


def test_parts_are_those_of_the_file(images: Path) -> None:
    found = source(images)
    assert found.count == 3
    assert list(found.blocks(7, LAZY_START, PAGES * PAGE)) == [(0, BLOCK - PAGE), (1, BLOCK), (2, 4 * PAGE)]
    assert found.around(7, LAZY_START) == (0, BLOCK - PAGE)
    assert found.around(7, LAZY_START + BLOCK) == (PAGE, BLOCK - PAGE)
    assert found.around(7, LAZY_START + (PAGES - 1) * PAGE) == (3 * PAGE, PAGE)


def test_data_is_read_also_by_a_process_that_continues(images: Path) -> None:
    first = source(images)
    with (images / "pages-3.img").open("rb") as file:
        second = ImageSource.parse(first.dump(), b"".join(block_digests.read(file)))
    for found in (first, second):
        read = b"".join(
            ctypes.string_at(found.read(part), part.size) for part in found.parts(7, LAZY_START, PAGES * PAGE)
        )
        assert read == DATA[PAGE:]


@pytest.mark.parametrize("place", [BLOCK, 2 * BLOCK - 1])
def test_a_damaged_block_is_not_used(images: Path, place: int) -> None:
    found = source(images)
    changed = bytearray(DATA)
    changed[place] ^= 1
    (images / "pages-3.img").write_bytes(changed)
    parts = list(found.parts(7, LAZY_START, PAGES * PAGE))
    found.read(parts[0])
    for _ in range(2):  # nor does it count as read
        with pytest.raises(Unreadable, match=f"pages-3.img: is damaged between byte {BLOCK} and {2 * BLOCK}"):
            found.read(parts[1])
    found.read(parts[2])


def test_a_file_that_became_shorter(images: Path) -> None:
    found = source(images)
    os.truncate(images / "pages-3.img", len(DATA) - 1)
    *_, last = found.parts(7, LAZY_START, PAGES * PAGE)
    with pytest.raises(Unreadable, match="is damaged"):
        found.read(last)


@pytest.mark.parametrize("pages", [PAGES - 1, PAGES + 1])
def test_a_page_map_that_does_not_fit_its_pages(images: Path, pages: int) -> None:
    put(images, [Entry(PAGE, 1, PRESENT), Entry(LAZY_START, pages, PRESENT | LAZY)])
    with pytest.raises(CriuError, match="does not fit"):
        spaces(images)


def test_a_page_map_of_a_dump_that_is_not_complete(images: Path) -> None:
    put(images, [Entry(PAGE, 1 + PAGES, PRESENT), Entry(LAZY_START, 1, LAZY)])
    with pytest.raises(CriuError, match="has pages that are not in"):
        spaces(images)
