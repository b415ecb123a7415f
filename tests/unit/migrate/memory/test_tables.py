"""The tables of missing memory against a dictionary of pages, with events in the kernel's order and out of order."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.memory import uffd
from migrate.memory.layout import PAGE
from migrate.memory.tables import Piece, Pieces, Table, Tables

Model = dict[int, int]  # page -> where it was at the dump
SPACE = 7
SPANS = st.tuples(st.integers(0, 30), st.integers(1, 12))


def pages(pieces: list[Piece]) -> Model:
    return {
        at // PAGE: (origin + at - start) // PAGE for start, end, origin in pieces for at in range(start, end, PAGE)
    }


def check(table: Table, model: Model) -> None:
    found = list(table.missing)
    assert pages(found) == model
    assert found == sorted(found)
    assert all(start < end for start, end, _ in found)
    assert table.missing.size == len(model) * PAGE
    for page in range(64):
        piece = table.missing.find(page * PAGE + 5)
        assert (None if piece is None else (piece[2] - piece[0]) // PAGE + page) == model.get(page)


def table_of(pages_missing: set[int], areas: list[tuple[int, int]]) -> Table:
    missing = Pieces((page * PAGE, (page + 1) * PAGE, page * PAGE) for page in sorted(pages_missing))
    return Table(SPACE, missing, Pieces((start * PAGE, end * PAGE, start * PAGE) for start, end in sorted(areas)))


@given(
    st.sets(st.integers(0, 29)),
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["remove", "unmap", "fork", "reload", "served"]), SPANS),
            st.tuples(st.just("move"), SPANS, st.integers(50, 80)),
        ),
        max_size=12,
    ),
)
def test_one_thread(missing: set[int], steps: list[tuple[object, ...]]) -> None:
    """Each event is applied before the next change. A fork's table goes its own way."""
    tables = Tables({SPACE: table_of(missing, [(0, 30)])})
    tables.pid = SPACE
    tables.add(3)
    models: dict[int, Model] = {3: {page: page for page in missing}}
    fd, place = 3, 100
    for kind, span, *_ in steps:
        start, count = span  # type: ignore[misc]
        end = start + count
        model = models[fd]
        inside = {page: origin for page, origin in model.items() if start <= page < end}
        gone: list[Piece] = []
        if kind == "remove":
            gone = tables.apply(fd, uffd.REMOVE, start * PAGE, end * PAGE, 0)
        elif kind == "unmap":
            gone = tables.apply(fd, uffd.UNMAP, start * PAGE, end * PAGE, 0)
        elif kind == "served":
            gone = tables.open[fd].missing.cut(start * PAGE, end * PAGE)
        elif kind == "fork":
            tables.apply(fd, uffd.FORK, fd + 1, 0, 0)
            models[fd + 1] = dict(model)
            fd += 1
            continue
        elif kind == "reload":
            tables = Tables.load(tables.dump())
            continue
        else:
            place += 20
            tables.apply(fd, uffd.REMAP, start * PAGE, place * PAGE, count * PAGE)
            gone = tables.apply(fd, uffd.UNMAP, start * PAGE, end * PAGE, 0)
            model.update({page - start + place: origin for page, origin in inside.items()})
            assert gone == []
            gone = [(page * PAGE, (page + 1) * PAGE, origin * PAGE) for page, origin in inside.items()]
        assert pages(gone) == inside
        for page in inside:
            del model[page]
    for number, model in models.items():
        check(tables.open[number], model)


class Threads:
    """Threads that change one address space at the same time; each sends its events after its change."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.regions = [(at * 8, self.random.randint(1, 8)) for at in range(6)]  # start and length, in pages
        self.model: Model = {}
        for start, count in self.regions:
            self.model |= {page: page for page in range(start, start + count) if self.random.random() < 0.8}
        self.table = table_of(set(self.model), [(start, start + count) for start, count in self.regions])

    def round(self) -> None:
        """Each thread makes one change; the events are mixed, and the changes have happened in yet another order."""
        self.random.shuffle(self.regions)
        events = []
        regions, self.regions = self.regions, []
        for number, (start, count) in enumerate(regions):
            others = regions[number + 1 :] + self.regions
            change = self.random.choice(["move", "unmap", "remove", "nothing"])
            if change == "move":
                places = [at for at in range(56 - count) if self._is_free(at, count, [*others, (start, count)])]
                if not places:
                    self.regions.append((start, count))
                    continue
                to = self.random.choice(places)
                moved = {page: self.model.pop(page) for page in range(start, start + count) if page in self.model}
                self.model |= {page - start + to: origin for page, origin in moved.items()}
                self.regions.append((to, count))
                events.append([(uffd.REMAP, start, to, count), (uffd.UNMAP, start, start + count, 0)])
                continue
            if change in ("unmap", "remove"):
                for page in range(start, start + count):
                    self.model.pop(page, None)
                events.append([(uffd.UNMAP if change == "unmap" else uffd.REMOVE, start, start + count, 0)])
            if change != "unmap":
                self.regions.append((start, count))
        while events:
            chosen = self.random.choice(events)
            event, *numbers = chosen.pop(0)
            tables = Tables({})
            tables.open[3] = self.table
            tables.apply(3, event, *(number * PAGE for number in numbers))
            events = [rest for rest in events if rest]
        self.table.settled()

    @staticmethod
    def _is_free(at: int, count: int, regions: list[tuple[int, int]]) -> bool:
        return all(at + count <= start or start + length <= at for start, length in regions)


@settings(max_examples=400)
@given(st.integers(0, 1 << 32))
def test_threads_that_use_what_others_have_freed(seed: int) -> None:
    threads = Threads(seed)
    for _ in range(4):
        threads.round()
        check(threads.table, threads.model)


def test_memory_that_is_moved_to_where_other_memory_was_unmapped() -> None:
    """The move is reported first."""
    table = table_of({1, 2, 11, 12}, [(0, 4), (10, 14)])
    assert table.moved(10 * PAGE, 0, 4 * PAGE) == []
    assert table.unmapped(10 * PAGE, 14 * PAGE) == []
    assert pages(table.unmapped(0, 4 * PAGE)) == {1: 1, 2: 2}
    check(table, {1: 11, 2: 12})
