"""Start the agent at a target: the first stage receives it, checks its digest and runs it."""

import secrets
import shlex
import time

import paramiko

from migrate.errors import DeadlineExceeded, HostError, TargetError
from migrate.wire import ssh
from migrate.wire.agent_zip import AgentZip
from migrate.wire.channel import last_line

START_TIMEOUT = 30.0
_NOISE_LIMIT = 256 << 10


# Runs at the target under `python3 -I -S -c`; no single quotes inside, for the login shell's sake.
_FIRST_STAGE = """
import hashlib, os, stat, sys
digest, size, token, have, temporary = sys.argv[1], int(sys.argv[2]), sys.argv[3], False, ""
if sys.version_info < (3, 11): sys.exit(70)
if os.geteuid() != 0: sys.exit(71)
top = "/run/pymigrate"
path = top + "/agent-" + digest + ".pyz"
def others(info): return info.st_uid or info.st_mode & 0o22
try:
    if not os.path.lexists(top): os.mkdir(top, 0o700)
    there = os.open(top, os.O_DIRECTORY | os.O_NOFOLLOW)
    if others(os.fstat(there)): sys.exit(75)
    os.fchmod(there, 0o700)
    if os.path.lexists(path):
        info = os.lstat(path)
        if stat.S_ISREG(info.st_mode) and info.st_size == size and not others(info):
            with open(path, "rb") as f: have = hashlib.sha256(f.read()).hexdigest() == digest
    if not have:
        temporary = path + "." + str(os.getpid())
        out = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700)
        os.posix_fallocate(out, 0, size)
    os.write(1, ("PYMIGRATE-AGENT " + token + (" HAVE" if have else " SEND") + chr(10)).encode())
    if not have:
        data = bytearray()
        while len(data) < size:
            piece = os.read(0, size - len(data))
            if not piece: sys.exit(73)
            data += piece
        if hashlib.sha256(data).hexdigest() != digest: sys.exit(74)
        with open(out, "wb") as f: f.write(data)
        os.rename(temporary, path)
except OSError as error:
    disk = os.statvfs("/run")
    free = disk.f_bavail * disk.f_frsize >> 10
    print(error.strerror, "(%d KiB needed, %d KiB free)" % (size + 1023 >> 10, free), file=sys.stderr)
    sys.exit(72)
finally:
    if temporary and os.path.exists(temporary): os.unlink(temporary)
os.execv(sys.executable, [sys.executable, "-I", "-S", path, "agent"])
""".strip()
_START_FAILURES: dict[int, tuple[str, str]] = {
    70: ("python3 is older than 3.11", "install python3 3.11 or newer there"),
    71: ("the log-in is not root", "log in as root: `User root` for this host in ~/.ssh/config"),
    72: ("/run/pymigrate cannot be written", "make room or remove what is in the way there"),
    73: ("the connection ended while the agent was being sent", "try again"),
    74: ("the agent arrived damaged", "try again; if it stays so, look at the network between the hosts"),
    75: ("/run/pymigrate can be changed by other users than root", "remove it there, with all that is in it"),
    126: ("python3 cannot be executed", "install python3 there (apt-get install python3)"),
    127: ("python3 is not installed", "install python3 there (apt-get install python3)"),
}


def start_agent(host: str, client: paramiko.SSHClient, agent: AgentZip) -> paramiko.Channel:
    """Run the first stage, give it the agent if it has none, and return the channel the agent speaks on."""
    token = secrets.token_hex(16)
    arguments = [_FIRST_STAGE, agent.digest, str(len(agent.data)), token]
    deadline = time.monotonic() + START_TIMEOUT
    transport = client.get_transport()
    if transport is None:
        raise HostError(f"{host}: the connection was lost")
    try:
        channel = transport.open_session(window_size=ssh.WINDOW, max_packet_size=64 << 10, timeout=START_TIMEOUT)
        channel.exec_command("exec python3 -I -S -c " + shlex.join(arguments))
        channel.settimeout(START_TIMEOUT)
        answer = _await_banner(host, channel, token, deadline)
        if answer == b"SEND":
            channel.sendall(agent.data)
        elif answer != b"HAVE":
            raise TargetError(f"{host}: the agent's first stage answered {answer[:40]!r}")
    except TimeoutError:
        raise DeadlineExceeded(f"{host}: the agent did not start within {START_TIMEOUT:g} s") from None
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise HostError(f"{host}: the connection was lost while the agent started: {error}") from None
    return channel


def _await_banner(host: str, channel: paramiko.Channel, token: str, deadline: float) -> bytes:
    """Skip what the log-in prints up to the banner line; return its last word."""
    mark = f"PYMIGRATE-AGENT {token} ".encode()
    seen = bytearray()
    while True:
        start = seen.find(mark)
        if start >= 0 and (end := seen.find(b"\n", start)) >= 0:
            return bytes(seen[start + len(mark) : end]).strip()
        if len(seen) > _NOISE_LIMIT:
            raise TargetError(
                f"{host}: the log-in prints without end instead of running a command",
                remedy=f"`ssh {host} true` must print nothing; look at root's shell start-up files there",
            )
        # One byte at a time near the end would be needed if the agent spoke first; it does not.
        data = channel.recv(4096)
        if not data:
            raise _start_failure(host, channel)
        seen += data
        if time.monotonic() > deadline:
            raise TimeoutError


def _start_failure(host: str, channel: paramiko.Channel) -> TargetError:
    status = channel.recv_exit_status() if channel.status_event.wait(5) else -1
    words = last_line(channel)
    known = _START_FAILURES.get(status)
    if known is not None:
        return TargetError(f"{host}: {known[0]}{f': {words}' if words else ''}", remedy=known[1])
    return TargetError(
        f"{host}: the agent cannot start there (exit status {status}{': ' + words if words else ''})",
        remedy=f"does `ssh {host} python3 -c 1` work?",
    )
