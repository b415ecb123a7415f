"""A client on another host that increments a number in Redis over one connection, and fails at the first error."""

import json
import select
import subprocess
from dataclasses import dataclass

from migrate.errors import DemoFailed

ANSWER_TIMEOUT = 30.0
END_TIMEOUT = 10.0

# For each line on stdin it prints how many answers came since the last line, and how long the longest took.
_PROGRAM = """
import json, select, socket, sys, time
sock = socket.create_connection((sys.argv[1], 6379), timeout=25)
stream, total, count, longest = sock.makefile("rb"), 0, 0, 0.0
while True:
    began = time.monotonic()
    sock.sendall(b"INCR visits\\r\\n")
    answer = stream.readline()
    total, count, longest = total + 1, count + 1, max(longest, time.monotonic() - began)
    if answer != b":%d\\r\\n" % total:
        sys.exit(f"the answer to increment {total} was {answer!r}")
    if select.select([0], [], [], 0.001)[0]:
        if not sys.stdin.readline():
            sys.exit()
        print(json.dumps({"answers": count, "longest": longest}), flush=True)
        count, longest = 0, 0.0
"""


@dataclass(frozen=True)
class Visits:
    """The number of answers since the last report, and the seconds that the longest of them took."""

    answers: int
    longest: float


class Client:
    """The running client; `command` is the prefix that runs a command on its host."""

    def __init__(self, command: list[str], address: str, environment: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        argv = [*command, "python3", "-c", _PROGRAM, address]
        self._process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)

    def visits(self) -> Visits:
        """Return the answers since the last call. Raises DemoFailed if the client had an error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], ANSWER_TIMEOUT)[0]:
                raise DemoFailed(f"the client has had no answer for {ANSWER_TIMEOUT:g} s")
            fields = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            _, words = self._process.communicate(timeout=END_TIMEOUT)
            lines = words.decode(errors="replace").strip().splitlines() or ["it exited"]
            raise DemoFailed(f"the client lost its connection: {lines[-1]}") from None
        return Visits(fields["answers"], fields["longest"])

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.communicate(timeout=END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
