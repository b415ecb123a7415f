"""What can go wrong between us and CRIU.

    CriuError (criu)
    +-- CriuNotFound       no criu binary, or no protobuf messages for it
    +-- CriuTooOld         the binary is older than what is asked of it
    +-- SwrkDied           the criu process ended or was killed in the middle of a request
    +-- BadAnswer          what it answered is not what the protocol allows
    +-- RequestFailed      it answered, and the answer is failure
    +-- DeadlineExceeded   (deadline) it did not answer in time; it was killed

The cause of a failure is in the `Error` lines of CRIU's log (causes.py says which), not in `cr_errmsg`: that holds the
first error line printed, which may be a harmless one of a request that succeeds.
"""

import errno
import os
import signal
from pathlib import Path

from criu_rpc import causes

_SHOWN = 5  # lines of the log


class CriuError(Exception):
    """Base of all errors of this package; `log_tail` holds the last error lines of CRIU's log, oldest first."""

    kind = "criu"

    def __init__(
        self,
        message: str,
        *,
        remedy: str | None = None,
        log_tail: tuple[str, ...] = (),
        log_path: Path | None = None,
    ) -> None:
        cause, advice = causes.find(log_tail)
        super().__init__(f"{message}: {cause}" if cause else message)
        self.log_tail, self.log_path = log_tail, log_path
        notes = [text for text in (remedy, advice) if text]
        notes += [f"criu: {line}" for line in log_tail[-_SHOWN:] if line != cause]
        notes += [f"log: {log_path}"] if log_path and log_path.exists() else []
        self.remedy = "\n".join(notes) or None


class CriuNotFound(CriuError):
    kind = "target"


class CriuTooOld(CriuError):
    kind = "target"


class SwrkDied(CriuError):
    """`status` is the exit status, negative for the number of the signal that killed it, None if unknown."""

    def __init__(
        self, request: str, status: int | None, *, log_tail: tuple[str, ...] = (), log_path: Path | None = None
    ) -> None:
        if status is None:
            how = "ended"
        elif status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        else:
            how = f"ended with exit status {status}"
        super().__init__(f"criu {how} in the middle of {request}", log_tail=log_tail, log_path=log_path)
        self.request, self.status = request, status


class BadAnswer(CriuError):
    def __init__(self, request: str, detail: str) -> None:
        super().__init__(f"criu answered {request} with {detail}")
        self.request, self.detail = request, detail


class RequestFailed(CriuError):
    """`errno` is what CRIU reports (0 when it reports none)."""

    def __init__(
        self, request: str, number: int, *, log_tail: tuple[str, ...] = (), log_path: Path | None = None
    ) -> None:
        reason = f" ({errno.errorcode.get(number, number)}: {os.strerror(number)})" if number else ""
        super().__init__(f"criu failed to {request}{reason}", log_tail=log_tail, log_path=log_path)
        self.request, self.errno = request, number


class DeadlineExceeded(CriuError):
    kind = "deadline"

    def __init__(self, request: str, seconds: float) -> None:
        super().__init__(f"criu did not finish {request} within {seconds:g} s and was killed")
        self.request, self.seconds = request, seconds
