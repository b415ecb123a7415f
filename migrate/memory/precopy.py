"""Send the memory of a running container in rounds: all of it first, then what was written meanwhile.

    with PreCopy(init, send, injector) as memory:
        memory.scan(); memory.send()      a round, while the container runs
        ...
        memory.scan_frozen()              right after the freeze: what was written since the last scan
        memory.send()
        memory.complete(lazy)             what CRIU lists as lazy and the target does not have

What CRIU lists of the frozen tree is the truth. A page that it does not list does not exist; one that it lists, and
that was not sent since it was written last, is sent by `complete`. So mappings and processes that are new, and
processes that cannot be tracked, only cost time.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

from migrate.memory import address_space, clean_pages, layout, tracker
from migrate.memory.injector import Injector
from migrate.memory.layout import Range
from migrate.memory.reader import Reader
from migrate.memory.soft_dirty import SoftDirty
from migrate.memory.tracker import Tracker
from migrate.memory.tracking import Gone, TrackingFailed
from runtime.linux import processes


class _Space:
    """The memory of one process of the container. `number` is its pid in there."""

    def __init__(self, pid: int, number: int, start_time: int | None, track: Callable[[int], Tracker]) -> None:
        """Raises OSError when the process has exited."""
        self.pid, self.number, self.start_time = pid, number, start_time
        self.sent: list[Range] = []  # what the target has
        self.left: list[Range] = []  # what was written since it was sent
        self.tracker: Tracker | None = None
        self.problem = ""
        try:
            self.tracker = track(pid)
        except TrackingFailed as error:
            self.problem = str(error)
        try:
            self.memory = address_space.open_memory(pid)  # last: after execve(2) the tracker reports that it is gone
        except OSError:
            if self.tracker is not None:
                self.tracker.close()
            raise

    def scan(self) -> None:
        """Note what was written since the last scan. Raises Gone."""
        if self.tracker is not None:
            self._note(self.tracker.scan())

    def scan_frozen(self) -> None:
        """The same when the process is frozen. Raises Gone."""
        if self.tracker is not None:
            self._note(self.tracker.written())

    def _note(self, written: list[Range]) -> None:
        self.left = layout.unite([*self.left, *written])
        self.sent = layout.subtract(self.sent, written)

    def send(self, ranges: Iterable[Range], send: Callable[[bytes], None]) -> int:
        """Send ranges, and return how many bytes of memory that was."""
        reader = Reader(self.memory, self.number)
        for body in reader.bodies(ranges):
            send(body)
        self.sent = layout.unite([*self.sent, *reader.read])
        return layout.size(reader.read)

    def close(self) -> None:
        os.close(self.memory)
        if self.tracker is not None:
            self.tracker.close()


class PreCopy:
    """The memory of a container, whose init is `init`. `send` takes the bodies of frames (layout.py)."""

    def __init__(self, init: int, send: Callable[[bytes], None], injector: Injector) -> None:
        self._init, self._send = init, send
        self._injector = injector
        self._spaces: dict[int, _Space] = {}
        self._seen = self._alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for space in self._spaces.values():
            space.close()
        self._spaces.clear()

    def _track(self, pid: int) -> Tracker:
        return tracker.track(pid, self._init, self._injector)

    @property
    def left(self) -> int:
        """Bytes that were written since they were sent, as of the last scan."""
        return sum(layout.size(space.left) for space in self._spaces.values())

    @property
    def rest(self) -> int:
        """Bytes that go in the freeze whatever was sent before: those of untracked processes."""
        total = 0
        for space in self._spaces.values():
            with contextlib.suppress(OSError):
                total += address_space.resident(space.pid) if space.tracker is None else 0
        return total

    @property
    def processes(self) -> int:
        return len(self._spaces)

    @property
    def untracked(self) -> list[str]:
        """The processes whose memory goes in the freeze, and why, in words."""
        return [f"process {space.pid} ({space.problem})" for space in self._spaces.values() if space.problem]

    def scan(self) -> int:
        """Find the processes, and what they have written. Return the bytes that are left to send."""
        self._find_lasting()
        for space in list(self._spaces.values()):
            try:
                space.scan()
            except Gone:
                self._forget(space)  # if it has executed another program, the next scan finds it
        return self.left

    def send(self) -> int:
        """Send what is left, and return how many bytes of memory that was."""
        sent = 0
        for space in self._spaces.values():
            left, space.left = space.left, []
            sent += space.send(left, self._send)
        return sent

    def skip(self) -> None:
        """Do not send what is left, as if the target had it."""
        for space in self._spaces.values():
            space.left = []

    def sample(self, most: int) -> Iterator[bytes]:
        """Yield bodies with some `most` bytes of what is left, from places all over it. Nothing counts as sent."""
        step = max(1, round(self.left / most))
        for space in self._spaces.values():
            runs = itertools.islice(layout.split(space.left), 0, None, step)
            yield from Reader(space.memory, space.number).bodies(
                (address, address + pages * layout.PAGE) for address, pages in runs
            )

    @property
    def clean(self) -> dict[int, int]:
        """Return the processes with much memory that soft-dirty bits call clean: pid in the container -> pid."""
        return {
            space.number: space.pid
            for space in self._spaces.values()
            if isinstance(space.tracker, SoftDirty) and layout.size(space.sent) >= clean_pages.WORTH
        }

    def scan_frozen(self) -> None:
        """The container is frozen: find out what was written since the last scan. `send` sends it."""
        self._find(new=False)
        for space in list(self._spaces.values()):
            try:
                space.scan_frozen()
            except Gone:
                self._forget(space)

    def complete(self, lazy: Mapping[int, list[Range]]) -> int:
        """Send what of `lazy` the target does not have. Return how many bytes that was.

        `lazy` is what CRIU has found in the frozen container: pid in there -> ranges of pages.
        """
        sent = 0
        spaces = {space.number: space for space in self._spaces.values()}
        if lazy.keys() - spaces.keys():
            self._find()
            spaces = {space.number: space for space in self._spaces.values()}
        for number, ranges in lazy.items():
            space = spaces.get(number)
            if space is not None:
                sent += space.send(layout.subtract(layout.unite(ranges), space.sent), self._send)
        return sent

    def _find(self, *, new: bool = True, without: Collection[int] = ()) -> None:
        """Forget processes that have exited, and if `new`, find those that are new, but not `without`."""
        alive = self._alive()
        for space in list(self._spaces.values()):
            if alive.get(space.pid) != space.start_time:
                self._forget(space)
        for pid in sorted(alive.keys() - self._spaces.keys() - set(without)) if new else ():
            with contextlib.suppress(OSError, StopIteration):
                self._spaces[pid] = _Space(pid, _number(pid), alive[pid], self._track)

    def _find_lasting(self) -> None:
        """The same for new processes that were there at the last call already.

        Most new ones exit soon, or execute a program: to send the memory that they have from their parent would be in
        vain. It goes in the freeze if they are still there.
        """
        alive = self._alive()
        passing = {pid for pid, start_time in alive.items() if self._seen.get(pid) != start_time}
        self._seen = alive
        self._find(without=passing)

    def _alive(self) -> dict[int, int | None]:
        """Return the container's processes with their start times."""
        return {pid: processes.start_time(pid) for pid in processes.descendants(self._init)}

    def _forget(self, space: _Space) -> None:
        """Have the target drop a space: the number may be given to another process."""
        del self._spaces[space.pid]
        space.close()
        self._send(layout.head(space.number, []))


def _number(pid: int) -> int:
    """Return the pid of a process in its own pid namespace. Raises OSError, IndexError."""
    with open(f"/proc/{pid}/status") as status:
        return int(next(line for line in status if line.startswith("NSpid:")).split()[-1])
