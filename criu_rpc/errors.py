"""Every error of the project, in one tree. Each package defines its own part; the kind is in brackets.

Error (failure)
+-- DeadlineExceeded (deadline)            something did not answer or finish in time
+-- CriuError (criu)                       this module: between this process and CRIU
|   +-- CriuNotFound (target)              no criu binary, or no protobuf messages for it
|   +-- CriuTooOld (target)                the binary is older than the request needs
|   +-- SwrkDied                           the criu process exited or was killed in the middle of a request
|   +-- BadAnswer                          the protocol does not allow its answer
|   +-- RequestFailed                      it answered that the request failed
+-- ContainerError (failure)               runtime/errors.py: with one container
|   +-- InvalidId (invalid)                an id that cannot be a directory's name
|   +-- SpecError (invalid)                config.json: names the file and the field
|   |   +-- NotSupported                   config.json asks for something that this version or kernel cannot do
|   +-- NotFound (not-found)               no such container
|   +-- Conflict (conflict)                the id is in use, or the status does not allow the verb
|   +-- StateError (invalid)               a state.json that cannot be read
|   +-- StartFailed (failure)              the container's init or an exec'ed process could not be set up
+-- MigrateError (failure)                 migrate/errors.py: while a container is moved
    +-- UsageError (usage)                 the command line names something that does not exist or does not fit
    +-- Blocked (blocked)                  preflight found reasons why the container cannot move
    +-- HostError (host)                   the other host is unknown or unreachable, refuses, or has the wrong key
    +-- TargetError (target)               the other host answers but cannot take part
    |   +-- ProtocolError                  the protocol does not allow a message that came over the wire
    +-- NoSpace (no-space)
    +-- Interrupted (interrupted)          Ctrl-C or SIGTERM
    |   +-- Cancelled                      `pymigrate cancel`, which stops one move and no other
    +-- DemoFailed (failure)               the demo checked something that does not hold
    +-- SnapshotError (invalid)            a directory that is not a snapshot, or a damaged one
    +-- MoveFailed                         a move that had begun; says where the container is now
        +-- RolledBack (rolled-back)       it runs at the source as before
        +-- MovedDirty (moved-dirty)       it runs at the target; something is left to be done by hand
        +-- InDoubt (in-doubt)             it is not known where it runs
        +-- Lost (lost)                    it was killed at the source and cannot be restored at the target

A few modules derive errors for their own use, such as wire/peer.py (RemoteFailure). `kind` is the key into the table of
exit codes (migrate/cli/exit_codes.py).

The runtime's verbs import this module, so it imports nothing that is not built into Python.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

_SHOWN = 5  # lines of the log


class Error(Exception):
    """Base of all errors. The message is one lower-case sentence without a full stop: what is wrong, and where.

    `remedy` says what to do about it. `workload` says where the container is when a move has failed: SOURCE, TARGET,
    NEITHER or UNKNOWN; None for any other error. `move` names container and move in JSON events: {"id", "migration"}.
    """

    kind = "failure"
    workload: str | None = None
    move: dict[str, str] | None = None

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy


class DeadlineExceeded(Error):
    kind = "deadline"


class CriuError(Error):
    """Base of the errors of CRIU; `log_tail` holds the last error lines of CRIU's log, oldest first.

    The cause of a failure is in those lines (see causes.py), not in `cr_errmsg`: that holds the first error line
    printed, which may be a harmless line of a request that succeeds.
    """

    kind = "criu"

    def __init__(
        self,
        message: str,
        *,
        remedy: str | None = None,
        log_tail: tuple[str, ...] = (),
        log_path: Path | None = None,
    ) -> None:
        from criu_rpc import causes

        cause, advice = causes.find(log_tail)
        notes = [text for text in (remedy, advice) if text]
        notes += [f"criu: {line}" for line in log_tail[-_SHOWN:] if line != cause]
        notes += [f"log: {log_path}"] if log_path and log_path.exists() else []
        super().__init__(f"{message}: {cause}" if cause else message, remedy="\n".join(notes) or None)
        self.log_tail, self.log_path = log_tail, log_path


class CriuNotFound(CriuError):
    kind = "target"


class CriuTooOld(CriuError):
    kind = "target"


class SwrkDied(CriuError):
    """`status` is the exit status, negative for the number of the signal that killed it, None if unknown."""

    def __init__(
        self, request: str, status: int | None, *, log_tail: tuple[str, ...] = (), log_path: Path | None = None
    ) -> None:
        from signal import Signals

        if status is None:
            how = "exited"
        elif status < 0:
            how = f"was killed by {Signals(-status).name}"
        else:
            how = f"exited with exit status {status}"
        super().__init__(f"criu {how} in the middle of {request}", log_tail=log_tail, log_path=log_path)
        self.request, self.status = request, status


class BadAnswer(CriuError):
    def __init__(self, request: str, detail: str) -> None:
        super().__init__(f"criu answered {request} with {detail}")
        self.request, self.detail = request, detail


class RequestFailed(CriuError):
    """`errno` is the number that CRIU reports (0 if it reports none)."""

    def __init__(
        self, request: str, number: int, *, log_tail: tuple[str, ...] = (), log_path: Path | None = None
    ) -> None:
        reason = f" ({errno.errorcode.get(number, number)}: {os.strerror(number)})" if number else ""
        super().__init__(f"criu failed to {request}{reason}", log_tail=log_tail, log_path=log_path)
        self.request, self.errno = request, number


def overdue(request: str, seconds: float) -> DeadlineExceeded:
    """Return the error of a CRIU that was killed because it did not finish in time."""
    return DeadlineExceeded(f"criu did not finish {request} within {seconds:g} s and was killed")
