"""The target's side of a connection: frames on stdin and stdout, calls from an allow-list, one move at a time.

It is started over SSH as root, and trusts nothing it reads. It has no threads, so that it can start processes safely.
When the connection ends before the source has told it to resume, it undoes everything, as if told to abort.
"""

import contextlib
import fcntl
import os
import select
import signal
import sys
import time
from types import FrameType as StackFrame
from typing import NoReturn

from criu_rpc.errors import Error
from migrate.disk import explained
from migrate.errors import Interrupted, MigrateError, ProtocolError
from migrate.paths import COMMAND_LINE
from migrate.target.handlers import Connected, Handler, Images, InRoom, Pages, Trial
from migrate.wire import frames, protocol, records
from migrate.wire.frames import FrameDecoder, FrameType
from migrate.wire.order import STREAMED, Progress, method_of
from migrate.wire.replies import Failure
from runtime.linux.descriptors import write_all

PULSE_INTERVAL = 5.0  # seconds
IDLE = 0.02  # seconds without a call after which there is time to prepare for the next one


class Agent:
    """One connection."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._decoder = FrameDecoder()
        self._progress = Progress()
        self._handler: Handler = Connected()
        self._pulsed = time.monotonic()

    def serve(self) -> int:
        """Answer calls until the source hangs up. Return the exit status: 0, or 1 after a violation of the protocol."""
        try:
            while size := self._read():
                if frame := self._decoder.filled(size):
                    self._frame(*frame)
            return 0
        except ProtocolError as error:
            print(f"pymigrate agent: {error}", file=sys.stderr)
            return 1
        finally:
            self._handler.lost()

    def _read(self) -> int:
        """Read into the decoder, and return how many bytes have come; 0 when the source has hung up."""
        limit = self._handler.idle_timeout
        silent_since = time.monotonic()
        wait = IDLE
        while self._reader not in (ready := self._ready(wait)):
            if not ready and wait == IDLE:
                self._handler.idle()
                wait = PULSE_INTERVAL
                continue
            for fd in ready:
                self._handler.read(fd)
                silent_since = time.monotonic()
            if time.monotonic() - silent_since > limit:
                raise ProtocolError(f"the source has sent nothing for {limit:g} s")
            if not ready or time.monotonic() - self._pulsed > PULSE_INTERVAL:
                self._pulse()
        if time.monotonic() - self._pulsed > PULSE_INTERVAL:
            self._pulse()
        return os.readv(self._reader, [self._decoder.room()])

    def _ready(self, timeout: float) -> list[int]:
        """Return which inputs are readable: the connection, or those of the handler; [] after `timeout` seconds."""
        return select.select([self._reader, *self._handler.inputs], [], [], timeout)[0]

    def _pulse(self) -> None:
        self._pulsed = time.monotonic()
        self._write(FrameType.PULSE, b"%d" % self._handler.activity)

    def _frame(self, kind: FrameType, payload: memoryview) -> None:
        if kind is FrameType.CALL:
            self._call(bytes(payload))
        elif kind not in STREAMED:
            raise ProtocolError(f"a {kind.name} frame came from the source")
        elif self._progress.admit_frame(kind):
            if kind is FrameType.MEMORY:
                assert isinstance(self._handler, InRoom | Trial)
                self._handler.memory(payload)
            else:
                assert isinstance(self._handler, Pages | Images)
                self._handler.stream(payload)

    def _call(self, payload: bytes) -> None:
        """Carry one call out: the table of order.py is the allow-list, and the only check of the order."""
        call = protocol.decode_call(payload)
        if not self._progress.admit(call):
            return
        try:
            reply = getattr(self._handler, method_of(type(call)))(call)
        except ProtocolError:
            raise
        except Exception as error:
            self._progress.failed(call)
            self._fail(error)
            return
        else:
            self._progress.done(call)
        finally:
            self._handler = self._handler.next
        if call.reply is not None:
            self._write(FrameType.REPLY, records.dumps(reply))
            self._handler.tidy()

    def _fail(self, error: Exception) -> None:
        """Report a failure. The move stays as it is until the source aborts or hangs up."""
        if isinstance(error, OSError):
            error = explained(error)
        elif not isinstance(error, Error):
            error = MigrateError(f"internal error in the agent: {type(error).__name__}: {error}")
        failure = Failure.of(getattr(error, "kind", "failure"), str(error), getattr(error, "remedy", None) or "")
        self._write(FrameType.FAILURE, records.dumps(failure))

    def _write(self, kind: FrameType, payload: bytes) -> None:
        write_all(self._writer, frames.header(kind, len(payload)) + payload)


def _terminate(signum: int, _frame: StackFrame | None) -> NoReturn:
    raise Interrupted(f"the agent was ended by {signal.Signals(signum).name}")


def _offer_command_line() -> None:
    """Give the agent's directory a name that is the same for every version, because it has all verbs."""
    if sys.argv[0].startswith(f"{COMMAND_LINE.parent}/"):
        new = f"{COMMAND_LINE}.{os.getpid()}"
        with contextlib.suppress(OSError):  # only a convenience
            os.symlink(os.path.dirname(sys.argv[0]), new)
            os.rename(new, COMMAND_LINE)


def main() -> int:
    """Serve one connection on stdin and stdout. Nothing else may write to stdout."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _terminate)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    writer = os.dup(1)
    os.dup2(2, 1)
    with contextlib.suppress(OSError):  # not a pipe, or not permitted: it is only slower
        fcntl.fcntl(0, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.chdir("/")
    os.umask(0o077)
    _offer_command_line()
    try:
        return Agent(0, writer).serve()
    except (Interrupted, BrokenPipeError) as error:
        print(f"pymigrate agent: {error}", file=sys.stderr)
        return 1
