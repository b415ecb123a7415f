"""The target's side of a connection: frames on stdin and stdout, calls from an allow-list, one move at a time.

Started over SSH as root; trusts nothing it reads. It is single-threaded: it can start processes safely. When the
connection ends before the source has told it to resume, it undoes everything, as if told to abort.
"""

import contextlib
import fcntl
import os
import select
import signal
import sys
import time
from types import FrameType as StackFrame
from typing import Any, NoReturn

from criu_rpc.errors import Error
from migrate.disk import explained
from migrate.errors import Interrupted, MigrateError, ProtocolError
from migrate.target.incoming import Incoming
from migrate.wire import frames, protocol
from migrate.wire.frames import FrameDecoder, FrameType
from migrate.wire.protocol import Call
from runtime.linux.descriptors import write_all

PULSE_INTERVAL = 5.0  # seconds
LONGEST = 4000  # characters of a failure's message
COMMAND_LINE = "/run/pymigrate/pymigrate.pyz"


class Agent:
    """One connection."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._decoder = FrameDecoder()
        self._incoming: Incoming | None = None
        self._pulsed = time.monotonic()

    def serve(self) -> int:
        """Answer calls until the source hangs up. Returns the exit status: 0, or 1 after a broken protocol."""
        try:
            while data := self._read():
                for kind, payload in self._decoder.feed(data):
                    self._frame(kind, payload)
            return 0
        except ProtocolError as error:
            print(f"pymigrate agent: {error}", file=sys.stderr)
            return 1
        finally:
            if self._incoming is not None:
                self._incoming.connection_lost()

    def _read(self) -> bytes:
        limit = self._incoming.idle_timeout if self._incoming else 60.0
        silent_since = time.monotonic()
        while not select.select([self._reader], [], [], PULSE_INTERVAL)[0]:
            if time.monotonic() - silent_since > limit:
                raise ProtocolError(f"the source has said nothing for {limit:g} s")
            self._pulse()
        if time.monotonic() - self._pulsed > PULSE_INTERVAL:
            self._pulse()
        return os.read(self._reader, 1 << 20)

    def _pulse(self) -> None:
        self._pulsed = time.monotonic()
        self._write(FrameType.PULSE, b"%d" % (self._incoming.activity if self._incoming else 0))

    def _frame(self, kind: FrameType, payload: bytes) -> None:
        if kind is FrameType.CALL:
            call = protocol.decode_call(payload)
            try:
                answer = self._dispatch(call)
            except ProtocolError:
                raise
            except Exception as error:
                self._fail(error)
                return
            if answer is not None:
                self._write(FrameType.REPLY, protocol.dumps(answer))
                if self._incoming is not None:
                    self._incoming.tidy()
        elif kind is FrameType.PAGES:
            self._move().pages(payload)
        elif kind is FrameType.DATA:
            self._move().data(payload)
        else:
            raise ProtocolError(f"a {kind.name} frame came from the source")

    def _dispatch(self, call: Call) -> dict[str, Any] | None:
        """One branch per call: the allow-list."""
        match call:
            case protocol.Hello():
                if call.version != protocol.VERSION:
                    raise ProtocolError(f"the source speaks protocol {call.version}, this agent {protocol.VERSION}")
                self._incoming = Incoming.begin(call.root)
                return {"version": protocol.VERSION, "host": os.uname().nodename, "pid": os.getpid()}
            case protocol.Facts():
                from migrate.preflight.hostfacts import FactsQuery, gather

                return gather(FactsQuery.from_json(call.query)).to_json()
            case protocol.Discard():
                return self._move().discard(call.migrations)
            case protocol.OpenBundle():
                return self._move().open_bundle(call)
            case protocol.BundleSent():
                return self._move().bundle_sent(call.fingerprint)
            case protocol.CheckTrees():
                return self._move().check_trees(call)
            case protocol.CheckFiles():
                from migrate.preflight import open_files

                return open_files.answer(call.files)
            case protocol.CheckPorts():
                from migrate.preflight import ports

                return ports.answer(call.netns, call.ports)
            case protocol.TreesSent():
                return self._move().trees_sent()
            case protocol.Prepare():
                return self._move().prepare(call)
            case protocol.PagesBegin():
                return self._move().pages_begin()
            case protocol.PagesEnd():
                return self._move().pages_end(call.size, call.digest)
            case protocol.Image():
                self._move().image(call.name, call.size, call.digest)
                return None
            case protocol.Restore():
                return self._move().restore(call)
            case protocol.Confirm():
                return self._move().confirm()
            case protocol.Resume():
                return self._move().resume()
            case protocol.History():
                return self._move().history(call.log)
            case protocol.Abort():
                return self._move().abort()
            case protocol.Settle():
                answer = self._move().settle(call.migration, call.verdict)
                self._move().tidy()
                return answer

    def _move(self) -> Incoming:
        if self._incoming is None:
            raise ProtocolError("the source did not say hello")
        return self._incoming

    def _fail(self, error: Exception) -> None:
        """Tell the source; the move stays as it is until the source aborts or hangs up."""
        if isinstance(error, OSError):
            error = explained(error)
        elif not isinstance(error, Error):
            error = MigrateError(f"internal error in the agent: {type(error).__name__}: {error}")
        message = {
            "kind": getattr(error, "kind", "failure"),
            "message": str(error)[:LONGEST],
            "remedy": (getattr(error, "remedy", None) or "")[:LONGEST] or None,
        }
        self._write(FrameType.FAILURE, protocol.dumps(message))

    def _write(self, kind: FrameType, payload: bytes) -> None:
        write_all(self._writer, frames.header(kind, len(payload)) + payload)


def _terminate(signum: int, _frame: StackFrame | None) -> NoReturn:
    raise Interrupted(f"the agent was told to end by {signal.Signals(signum).name}")


def _offer_command_line() -> None:
    """Give the agent's directory a name that is the same for every version, because it has all verbs."""
    if sys.argv[0].startswith(os.path.dirname(COMMAND_LINE) + "/"):
        new = f"{COMMAND_LINE}.{os.getpid()}"
        with contextlib.suppress(OSError):  # only a convenience
            os.symlink(os.path.dirname(sys.argv[0]), new)
            os.rename(new, COMMAND_LINE)


def main() -> int:
    """Serve one connection on stdin and stdout; nothing else may write to stdout."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _terminate)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    writer = os.dup(1)
    os.dup2(2, 1)
    with contextlib.suppress(OSError):  # no pipe, or not allowed: then it is only slower
        fcntl.fcntl(0, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.chdir("/")
    os.umask(0o077)
    _offer_command_line()
    try:
        return Agent(0, writer).serve()
    except (Interrupted, BrokenPipeError) as error:
        print(f"pymigrate agent: {error}", file=sys.stderr)
        return 1
