"""The keeper of a move's images: a process that takes them to the disk when their agent cannot.

An agent starts it before anything is frozen, with one end of a socketpair as its standard input:

    agent                      keeper
      | <--- b"r" ------------- |  it has started: that takes no time from the freeze
      | ---- b"w" ------------> |  the images may become the last copy: within a second the outcome has to come
      | ---- (end of file) ---> |  the agent has ended: before b"w", remove the images; after it, take them to the disk
      X ---- SIGKILL ---------> |  the outcome is known

So it acts whatever ends the agent, kill -9 included, and the agent, which has no threads, waits for no disk. It may be
killed while it copies: the copy then lacks its final name, and is removed with the images.

Modules are imported only when there is something to do, because usually there is not, and the freeze is about to begin.
"""

import contextlib
import os
import select


def main(argv: list[str]) -> int:
    """argv: migration, directory of its images, its kind, seconds of patience. Standard input is the agent's socket."""
    migration, path, kind, patience = argv
    os.umask(0o077)
    with contextlib.suppress(OSError):  # the agent has ended already, and may have said something before
        os.write(0, b"r")
    word = _hear()
    if word:
        select.select([0], [], [], float(patience))
        os.nice(10)
    from pathlib import Path

    from criu_rpc.errors import Error
    from migrate.target import image_places
    from migrate.target.images import ReceivedImages

    images = ReceivedImages(migration, Path(path), "memory" if kind == "memory" else "disk")
    if not word:
        images.remove()
        return 0
    try:
        images.persist(keep=True)
    except (Error, OSError):
        return 1  # they stay in memory
    _hear()  # CRIU may have them open as long as the agent lives
    if kind == "memory":
        image_places.remove_memory(migration)
    return 0


def _hear() -> bytes:
    """Wait for the agent's next word; b"" when it has ended."""
    try:
        return os.read(0, 1)
    except OSError:  # it has ended without having heard us
        return b""
