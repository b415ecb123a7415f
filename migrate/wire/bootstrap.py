"""Start the agent at a target: a first stage receives it, checks its digest, unpacks it and runs it.

The agent is unpacked once, and Python itself keeps its byte code there. A directory is complete as soon as it has its
name, because it is unpacked beside and renamed; nothing needs to be synced in /run. What a killed first stage has left
is removed by the next one. A tree that is incomplete, has a link, or that another user could change is replaced.

Measured up to the answer to Hello, against zipimport with code that we marshalled ourselves: the first start of a
version takes 217 ms instead of 200 ms, every later one 100 ms instead of 115 ms (least of 24), and the agent is 566 KiB
on the wire instead of 731 KiB.
"""

import secrets
import shlex
import time
from concurrent.futures import ThreadPoolExecutor

import paramiko

from migrate.errors import DeadlineExceeded, HostError, TargetError
from migrate.limits import AGENT_START_TIMEOUT
from migrate.wire import ssh
from migrate.wire.agent_zip import AgentZip
from migrate.wire.channel import last_line

_NOISE_LIMIT = 256 << 10

# Runs at the target under `python3 -I -S -c`. It has no single quotes, so that every log-in shell can pass it on.
FIRST_STAGE = """
import os, sys
digest, size, unpacked, token = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if sys.version_info < (3, 11): sys.exit(70)
if os.geteuid() != 0: sys.exit(71)
top = "/run/pymigrate"
path = top + "/agent-" + digest
me = str(os.getpid())
new = path + "." + me
os.umask(0o077)
def others(info): return info.st_uid or info.st_mode & 0o22
def sources(place):
    total = 0
    with os.scandir(place) as entries:
        for entry in entries:
            info = entry.stat(follow_symlinks=False)
            if others(info): return -1
            if entry.is_dir(follow_symlinks=False):
                inner = sources(entry.path)
                if inner < 0: return -1
                total += inner
            elif not entry.is_file(follow_symlinks=False): return -1
            elif entry.name.endswith(".py"): total += info.st_size
    return total
def whole():
    if os.path.islink(path) or not os.path.isdir(path) or others(os.lstat(path)): return False
    return sources(path) == unpacked
def remove(place):
    try:
        if os.path.isdir(place) and not os.path.islink(place):
            import shutil
            shutil.rmtree(place)
        elif os.path.lexists(place): os.unlink(place)
    except FileNotFoundError: pass  # another first stage removes it
try:
    for place in "/", "/run":
        info = os.stat(place)
        if info.st_uid or info.st_mode & 0o22 and not info.st_mode & 0o1000: sys.exit(75)
    os.makedirs(top, 0o700, exist_ok=True)
    there = os.open(top, os.O_DIRECTORY | os.O_NOFOLLOW)
    if others(os.fstat(there)): sys.exit(75)
    os.fchmod(there, 0o700)
    for name in os.listdir(top):
        pid = name.partition(".")[2].partition(".")[0]
        if name.startswith("agent-") and pid.isdigit() and (pid == me or not os.path.exists("/proc/" + pid)):
            remove(top + "/" + name)
    have = whole()
    if not have:
        room = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.posix_fallocate(room, 0, unpacked)
    os.write(1, ("PYMIGRATE-AGENT " + token + (" HAVE" if have else " SEND") + chr(10)).encode())
    if not have:
        import hashlib, marshal, zlib
        data = bytearray()
        while len(data) < size:
            piece = os.read(0, size - len(data))
            if not piece: sys.exit(73)
            data += piece
        if hashlib.sha256(data).hexdigest() != digest: sys.exit(74)
        os.unlink(new)
        os.close(room)
        last = ""
        for name, content in marshal.loads(zlib.decompress(data)):
            place = new + "/" + os.path.dirname(name)
            if place != last: os.makedirs(place, exist_ok=True)
            last = place
            with open(new + "/" + name, "xb") as out: out.write(content)
        try: os.rename(new, path)
        except OSError:
            if not whole():
                os.rename(path, new + ".old")
                os.rename(new, path)
except OSError as error:
    disk = os.statvfs("/run")
    free = disk.f_bavail * disk.f_frsize >> 10
    print(error.strerror, "(%d KiB needed, %d KiB free)" % (unpacked + 1023 >> 10, free), file=sys.stderr)
    sys.exit(72)
finally:
    remove(new)
    remove(new + ".old")
os.execv(sys.executable, [sys.executable, "-I", "-S", path + "/__main__.py", "agent"])
""".strip()
_START_FAILURES: dict[int, tuple[str, str]] = {
    70: ("python3 is older than 3.11", "install python3 3.11 or newer there"),
    71: ("the log-in is not root", "log in as root: `User root` for this host in ~/.ssh/config"),
    72: ("/run/pymigrate cannot be written", "make room there, or remove the file in its place"),
    73: ("the connection ended while the agent was being sent", "try again"),
    74: ("the agent arrived damaged", "try again; if that does not help, check the network between the hosts"),
    75: ("/run/pymigrate can be changed by other users than root", "remove it there, with everything in it"),
    126: ("python3 cannot be executed", "install python3 there (apt-get install python3)"),
    127: ("python3 is not installed", "install python3 there (apt-get install python3)"),
}


def reach(host: str) -> tuple[paramiko.SSHClient, paramiko.Channel]:
    """Log in to `host` ([USER@]NAME) and start the agent there. Return the session and the agent's channel.

    Raises what `ssh.login` and `start_agent` raise.
    """
    with ThreadPoolExecutor(1, "agent") as beside:
        loading = beside.submit(AgentZip.load)  # while the log-in waits for the host
        client = ssh.login(host)
    try:
        return client, start_agent(host, client, loading.result())
    except BaseException:
        client.close()
        raise


def arguments(agent: AgentZip, token: str) -> list[str]:
    """Return the arguments of `python3 -I -S -c` that start the agent."""
    return [FIRST_STAGE, agent.digest, str(len(agent.data)), str(agent.unpacked), token]


def start_agent(host: str, client: paramiko.SSHClient, agent: AgentZip) -> paramiko.Channel:
    """Run the first stage, send the agent if the target does not have it, and return the agent's channel.

    Raises TargetError, HostError, DeadlineExceeded.
    """
    token = secrets.token_hex(16)
    deadline = time.monotonic() + AGENT_START_TIMEOUT
    transport = client.get_transport()
    if transport is None:
        raise HostError(f"{host}: the connection was lost")
    try:
        channel = transport.open_session(window_size=ssh.WINDOW, max_packet_size=64 << 10, timeout=AGENT_START_TIMEOUT)
        channel.exec_command("exec python3 -I -S -c " + shlex.join(arguments(agent, token)))
        channel.settimeout(AGENT_START_TIMEOUT)
        answer = _await_banner(host, channel, token, deadline)
        if answer == b"SEND":
            channel.sendall(agent.data)
        elif answer != b"HAVE":
            raise TargetError(f"{host}: the agent's first stage answered {answer[:40]!r}")
    except TimeoutError:
        raise DeadlineExceeded(f"{host}: the agent did not start within {AGENT_START_TIMEOUT:g} s") from None
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise HostError(f"{host}: the connection was lost while the agent started: {error}") from None
    return channel


def _await_banner(host: str, channel: paramiko.Channel, token: str, deadline: float) -> bytes:
    """Skip the output of the log-in up to the banner line, and return the last word of that line."""
    mark = f"PYMIGRATE-AGENT {token} ".encode()
    seen = bytearray()
    while True:
        start = seen.find(mark)
        if start >= 0 and (end := seen.find(b"\n", start)) >= 0:
            return bytes(seen[start + len(mark) : end]).strip()
        if len(seen) > _NOISE_LIMIT:
            raise TargetError(
                f"{host}: the log-in prints more than {_NOISE_LIMIT >> 10} KiB instead of running a command",
                remedy=f"`ssh {host} true` must print nothing; check root's shell start-up files there",
            )
        # This cannot read beyond the banner, because the agent sends nothing before it is asked.
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
