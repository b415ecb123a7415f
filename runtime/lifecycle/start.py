"""Start the program of a created container. An engine waits for this, so it loads as little as possible."""

from __future__ import annotations

import os
import select

from runtime.errors import ContainerError, DeadlineExceeded, StartFailed
from runtime.limits import PROGRAM_TIMEOUT
from runtime.linux import processes
from runtime.state.status import Status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.state.record import State
    from runtime.state.store import Store


def start(store: Store, container_id: str) -> State:
    """Have the init of a created container run its program."""
    with store.lock_existing(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "start")
        fifo, errors_fifo = (f"{state.directory}/{name}.fifo" for name in ("exec", "error"))
        try:
            errors = os.open(errors_fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            # Saved before init continues: a program that exits at once must not look like one that was never started.
            state = state.replace(started=True)
            store.save(state)
            os.write(fd, b"0")
            os.close(fd)
        except OSError as error:
            if processes.is_dying(state.pid):  # `kill` does not wait for the lock
                Status.STOPPED.require(container_id, "start")
            raise ContainerError(
                f"container {container_id}: its init is no longer waiting to be started: {error.strerror}"
            ) from None
        _await_program(errors)
        os.unlink(fifo)
        os.unlink(errors_fifo)
        if state.hooks.get("poststart"):
            from runtime.init import hooks

            hooks.run_later(state, "poststart")
        return state


def _await_program(errors: int) -> None:
    """Wait until init has become the container's program. Raises StartFailed with init's message, DeadlineExceeded.

    `errors` reads from a fifo that only init can write to: it reaches its end when init's exec has closed it.
    """
    poll = select.poll()
    poll.register(errors, select.POLLIN)
    try:
        if not poll.poll(PROGRAM_TIMEOUT * 1000):
            raise DeadlineExceeded(f"the container's init did not become its program within {PROGRAM_TIMEOUT:g} s")
        words = os.read(errors, 1 << 16)
    finally:
        os.close(errors)
    if words:
        raise StartFailed(words.decode(errors="replace"))
