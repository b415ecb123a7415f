"""What the two processes of a page handler share beside their descriptors: a page of numbers.

Each number is set by one store of eight bytes, so a process that is killed leaves the old or the new one.
"""

import enum

from migrate.memory import uffd

_SIZE = 4096
NONE = -1  # no descriptor


class Word(enum.IntEnum):
    """The numbers; the first ones are descriptors, in the table that both processes share."""

    LOG = 0  # the log of events
    DATA = 1  # the store; NONE if the images have the memory
    INDEX = 2  # where the memory is in it, or in the images
    DONE = 3  # a byte for each block of the source
    LISTENING = 4  # for CRIU
    CRIU = 5  # its connection
    AGENT = 6  # the connection to the agent
    NOTE = 7  # the locked file in the container's directory
    CLOSING = 8  # a userfaultfd whose end is being logged, and that is closed then
    STANDBY = 9  # the pidfd of the standby
    COMMAND = 10  # of the agent, being worked on
    RESUMED = 11  # the container runs
    TOTAL = 12  # bytes that were missing at first
    LEFT = 13  # bytes that are missing
    OVER = 14  # there is nothing left to do
    DIGESTS = 15  # of the blocks of the images; NONE if there is a store
    FAILED = 16  # memory cannot be read, as the note says: the container has to be ended


_DESCRIPTORS = (
    Word.LOG, Word.DATA, Word.INDEX, Word.DONE, Word.LISTENING, Word.CRIU, Word.AGENT, Word.NOTE, Word.CLOSING,
    Word.STANDBY, Word.DIGESTS,
)  # fmt: skip


class Control:
    """The page: `control[Word.LOG]`. Descriptors are NONE at first, other numbers 0."""

    def __init__(self) -> None:
        """Make the page, before the process is cloned. Raises OSError."""
        self._bytes = uffd.view(uffd.map_shared(-1, _SIZE), _SIZE)
        self._words = self._bytes.cast("q")
        for word in _DESCRIPTORS:
            self[word] = NONE

    def __getitem__(self, word: Word) -> int:
        return self._words[word]

    def __setitem__(self, word: Word, value: int) -> None:
        self._words[word] = value

    def first_byte(self, word: Word) -> memoryview:
        """Return the lowest byte of a number, for a read(2) straight into it."""
        at = word * 8 + (0 if memoryview(b"\1\0").cast("H")[0] == 1 else 7)
        return self._bytes[at : at + 1]
