"""How a container ends at the source, once the journal says COMMITTED: the one order of the steps."""

import contextlib
from collections.abc import Callable

from criu_rpc.errors import Error
from migrate import faults
from runtime.freeze import network_lock
from runtime.network import veth
from runtime.spec.config import Spec
from runtime.state import moved_mark
from runtime.state.record import State


def end_source(state: State, spec: Spec | None, kill: Callable[[], None], warn: Callable[[str], None]) -> None:
    """End the container here: when this returns, none of its processes runs again. May be repeated.

    `spec` is None if it cannot be read. `kill` kills the processes; their end must be certain when it returns. In a
    network that others use too, they must also have exited. Its errors are raised.
    """
    # 1. Mark an engine's bundle, so that the engine does not start the container here again.
    try:
        moved_mark.note(state)
    except OSError as error:
        warn(f"{state.bundle} cannot be marked ({error.strerror}): an engine may start {state.id} here again")
    with faults.point("end-source"):
        # 2. Set its link down, because its peers must hear nothing from it here while it dies.
        if state.has_bridge:
            with contextlib.suppress(OSError, Error):  # it has to end all the same
                veth.take_down(state)
        # 3. Kill it.
        with faults.point("kill"):
            kill()
        # 4. Open a network that it shared to the others in it; only its connections stay locked.
        if spec is not None:
            network_lock.ended(spec, state.id)
