"""How a move into this host ends whose connection was lost: by the verdict of its source, in whatever process.

To have the container run, nothing is removed before it runs, whatever fails.
"""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

from criu_rpc.errors import Error
from migrate.errors import DeadlineExceeded, TargetError
from migrate.files import receivers
from migrate.files.trees import Owner
from migrate.journal import journal
from migrate.journal.journal import Entry
from migrate.limits import OLD_AGENT_TIMEOUT, RESTORE_TIMEOUT, SETTLE_LOCK_TIMEOUT
from migrate.memory import store as memory_store
from migrate.memory.handler import PageHandler
from migrate.phases import FINAL, Phase, workload
from migrate.target import memory, places, tmpfs_archive
from migrate.target import tmpfs as target_tmpfs
from migrate.target.images import ReceivedImages
from migrate.target.incoming import Incoming, open_store
from migrate.wire.protocol import Settle
from migrate.wire.replies import Settled
from runtime.checkpoint.restore import Restoring
from runtime.linux import processes
from runtime.state.record import check_id
from runtime.state.store import Store


def settle(store: Store, call: Settle, later: contextlib.ExitStack) -> Settled:
    """End a move, or say how it has ended; see protocol.Settle.

    `later` gets what can wait until the reply has been sent: what could not be restored is taken to the disk, for
    another attempt. Raises TargetError when nothing is known here of the move, or its container cannot be restored at
    present: what is here of it stays.
    """
    entry = _known(call.migration)
    if entry is None and call.verdict == "abort":
        return Settled("SOURCE")
    if entry is None:
        raise TargetError(
            f"nothing is known here of migration {call.migration}",
            remedy="is this the host that it went to, and is its /var/lib/pymigrate mounted?",
        )
    if call.verdict == "ask":
        return Settled(workload(entry.phase, "target"))
    if entry.phase is not Phase.RESUMED:
        _end_old_agent(entry.fields.get("agent", {}))
    with store.lock(check_id(entry.id), SETTLE_LOCK_TIMEOUT):
        entry = _known(call.migration) or entry
        if entry.phase is Phase.RESUMED:  # whatever has become of it since
            return Settled("TARGET", since=entry.updated)
        if entry.phase is Phase.ABORTED:  # undone already: what is in its places by now is not its own
            reason = f"migration {call.migration} was undone here at {entry.updated}, and its images were removed"
            return Settled("SOURCE") if call.verdict == "abort" else Settled("NEITHER", reason=reason)
        receivers.end(entry.migration)
        incoming = Incoming.resume(store, entry)
        images = ReceivedImages.existing(entry.migration)
        with contextlib.ExitStack() as undecided:
            if images is not None:
                undecided.callback(later.callback, _leave, images)
            settled = _carry_out(call.verdict, entry, incoming, images)
            if settled.workload != "NEITHER":
                undecided.pop_all()
        return settled


def _carry_out(verdict: str, entry: Entry, incoming: Incoming, images: ReceivedImages | None) -> Settled:
    """Settle a move that is still open, with nobody else at it; `images` are None unless all had come."""
    if Restoring.left_behind(incoming.store, entry.id, entry.migration, OLD_AGENT_TIMEOUT) is not None:
        incoming.resumed()
        incoming.clean(images)
        return Settled("TARGET", since=entry.updated)
    if verdict == "abort":
        if images is not None:
            images.remove()
        incoming.undo()
        return Settled("SOURCE")
    if images is None:
        return Settled("NEITHER", reason=f"there are no whole images of migration {entry.migration} here")
    if reason := _lost(entry, images):
        return Settled("NEITHER", reason=reason)
    _restore(entry, incoming, images)
    incoming.resumed()
    incoming.files.flush()
    incoming.files.note_use()
    incoming.clean(images)
    return Settled("TARGET")


def discard(migrations: list[str]) -> None:
    """Remove what is left of moves that their source has aborted while this host was dead or cut off."""
    for migration in migrations:
        entry = _known(migration)
        if entry is not None and entry.phase not in FINAL:
            _abort(entry, entry.root)


def close_older(owner: Owner) -> None:
    """Abort all earlier moves of a container that comes again: it runs where it comes from, so none may run here."""
    for entry in list(journal.entries()):
        if entry.role == "target" and entry.phase not in FINAL and places.owner_of(entry) == owner:
            _abort(entry, owner.root)


def _abort(entry: Entry, root: str) -> None:
    with contextlib.ExitStack() as later:
        settle(open_store(root), Settle(entry.migration, "abort"), later)


def _lost(entry: Entry, images: ReceivedImages) -> str:
    """Return why the container can never be restored here, "" if it can. The images' digests count, not the phase.

    Raises OSError, and TargetError when nothing says whether the images are complete.
    """
    try:
        images.verify()
    except TargetError as damage:
        return str(damage)
    tmpfs_archive.unpack(entry.migration, images.path)
    try:
        target_tmpfs.check(entry.fields.get("plan", {}).get("tmpfs", {}).values())
    except TargetError as lost:
        return str(lost)
    if not images.has_manifest and entry.phase is not Phase.PREPARED:  # the line of PREPARED may be lost
        raise TargetError(f"{images.path}: nothing says whether these images are complete ({entry.phase})")
    return ""


def _restore(entry: Entry, incoming: Incoming, images: ReceivedImages) -> None:
    """Restore the container, which the source has ended, from images that are whole, and resume it."""
    plan = entry.fields.get("plan", {})
    if entry.id in incoming.store.ids():
        raise TargetError(
            f"another container here has the id {entry.id}",
            remedy=f"move or delete that one, then run `pymigrate recover {entry.id}` again",
        )
    restoring = incoming.begin_restore(images, plan)
    handler = None
    timeout = max(RESTORE_TIMEOUT, plan.get("timeout", 0.0))  # nothing runs: no reason for haste
    try:
        if memory_store.exists(images.path):
            handler = PageHandler.start(images.path, Path(restoring.memory_note))
            memory.restore_lazily(restoring, handler, timeout)
        else:
            restoring.restore(timeout)
        if incoming.log.phase is not Phase.PREPARED:
            incoming.log.record(Phase.PREPARED)
        restoring.resume()
    except BaseException:
        if handler is not None:
            handler.leave()
        restoring.abort()
        if handler is not None:
            handler.await_end()
        raise
    if handler is not None:
        handler.resumed()
        handler.leave()


def _leave(images: ReceivedImages) -> None:
    with contextlib.suppress(Error, OSError):
        images.leave()


def _known(migration: str) -> Entry | None:
    """Return the journal's entry of a move into this host."""
    entry = journal.load(migration)
    return entry if entry is not None and entry.role == "target" else None


def _end_old_agent(agent: dict[str, Any]) -> None:
    """End the agent of a lost connection, which may not have noticed yet, so that only this process acts."""
    pid, start = agent.get("pid", 0), agent.get("start_time")
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, TypeError):
        return
    try:
        if pid == os.getpid() or processes.start_time(pid) != start:
            return
        for number in (signal.SIGTERM, signal.SIGCONT):  # it may be stopped
            signal.pidfd_send_signal(pidfd, number)
        if not processes.wait_exit(pidfd, OLD_AGENT_TIMEOUT):
            words = f"did not exit within {OLD_AGENT_TIMEOUT:g} s"
            raise DeadlineExceeded(f"the agent of the lost connection (process {pid}) {words}")
    finally:
        os.close(pidfd)
