"""Decide a move at its target without the source: `pymigrate recover --force-target`.

It warns first, because this host cannot know what the source does.
"""

import contextlib
import socket

from migrate.errors import Lost, MigrateError
from migrate.journal.undecided import NothingToRecover, undecided_here
from migrate.target.settle import settle
from migrate.wire.protocol import Settle
from runtime import notices
from runtime.linux import processes
from runtime.state.store import Store


def force_target(store: Store, container_id: str) -> str:
    """Restore the container here from the images of its move, because the source or its journal is gone for good.

    Return where it is, in words. Raises NothingToRecover; MigrateError when the move is still under way; Lost when the
    images are not whole.
    """
    entry = undecided_here(store, container_id)
    if entry is None:
        raise NothingToRecover(
            f"no move of container {container_id} into this host is undecided", remedy="see `pymigrate migrations`"
        )
    agent = entry.fields.get("agent", {})
    if processes.is_alive(int(agent.get("pid", 0)), agent.get("start_time")):
        raise MigrateError(
            f"container {container_id}: its move from {entry.source} is under way: "
            f"the agent (process {agent['pid']}) still has a connection",
            remedy="an agent whose connection is dead exits by itself within some minutes",
        )
    notices.warn(
        f"{entry.source} is taken to be gone for good: if it still runs {entry.id}, or has run it since the images "
        "were made, there are two of it, and the one here is older"
    )
    with contextlib.ExitStack() as later:  # what cannot be restored stays, for another attempt
        answer = settle(store, Settle(entry.migration, verdict="resume"), later)
    if answer.workload != "TARGET":
        raise Lost(f"container {container_id} cannot be restored here: {answer.reason}")
    return f"{container_id}: runs at {socket.gethostname()}"
