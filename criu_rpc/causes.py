"""Find the cause of a failure among the error lines of CRIU's log, in words that a user understands.

CRIU first prints errors of probes that do not stop it, then the cause, then its consequences at each level above. So
the first known line is the cause; without one, the last line that is neither noise nor a consequence.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# These do not stop CRIU: probes of the kernel, operations that it lacks the privilege for, its own clean-up.
_NOISE = re.compile(
    r"rlimit: Can't setup RLIMIT_NOFILE"
    r"|tun: (?:Unable to create tun|Can't check tun support|No proper support for tun)"
    r"|cg: cgroupd: recv req error"
    r"|sockets: Diag module missing"
    r"|exited, status=\d+$"
    r"|Unable to detach from \d+: No such process"
)
# The consequences of a failure at the levels above it.
_CONSEQUENCE = re.compile(
    r"(?:Dumping|Restoring|Pre-dumping) FAILED"
    r"|(?:Dump|Collect) \w+ \(pid: \d+\) failed with"
    r"|Can't make \w+ id$"
    r"|Unable to open fd=\d+ id="
    r"|`- Can't open vma"
    r"|Can't dump page with parasite"
    r"|Message reply from daemon is trimmed|Command \d+ for daemon failed"
    r"|Timeout reached\. Try to interrupt"
    r"|page-xfer: Can't read pages|Task \d+ exited"
)
_SAME_FILES = "the same files must be at both hosts (a volume: --volume PATH=copy)"
_DAMAGED = "make the images again; those of a snapshot: `pymigrate snapshot show DIR`"

# CRIU's message, its meaning, and the remedy.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    # Anywhere.
    (r"No space left on device|Disk quota exceeded", "a disk is full", "make room there"),
    (r"vdso: Unexpected rt vDSO area bounds", "this CRIU is too old for this kernel", "run vagrant/provision.sh"),
    (r"page-xfer: .*(?:Broken pipe|Connection reset)", "the connection that takes the memory pages was lost", ""),
    # Dumps: processes.
    (
        r"Unseizable non-zombie (\d+) found, state D",
        r"process \1 sleeps in the kernel (state D) and cannot be frozen",
        "wait until it wakes up; the parent of a vfork waits for its child",
    ),
    (
        r"Unseizable non-zombie (\d+) found, state", r"process \1 cannot be frozen: another program traces it",
        "detach the debugger (strace, gdb)",
    ),
    (
        r"Can't dump the (\d+) thread with a pending SIGTRAP", r"a SIGTRAP is pending for thread \1",
        "have the program unblock the signal",
    ),
    (
        r"Can't get rlimit \d+: Operation not permitted|unpriviliged task whose /proc",
        "a process of another user cannot be dumped",
        "CRIU needs CAP_SYS_RESOURCE for it, which this host's root lacks",
    ),
    (
        r"session leader of (?:zombie process )?(\d+)\(\d+\) is outside",
        r"the session leader of process \1 is outside the container",
        "start it with setsid",
    ),
    (r"Can't dump nested (\w+) namespace for (\d+)", r"process \2 has a \1 namespace of its own", "run it without"),
    (
        r"Zombies with threads are not supported", "the first thread of a process has exited, and others run",
        "have the first thread wait for the others",
    ),
    (r"Found dangling tty", "a process has a terminal of another container or of the host", "`checkpoint --shell-job`"),
    (r"Some file locks are hold", "a process holds file locks", "`checkpoint --file-locks`"),
    # Dumps: memory and files.
    (r"send_fds failed|Can't retrieve FDs from socket", "a process has an io_uring", "run it without io_uring"),
    (r"Unknown shit \d+ \((.*)\)", r"\1 is mapped, which CRIU cannot carry", "run the program without it"),
    (
        r"Can't dump file (\d+) of that type \[\w+\] \((?:\w+ )?(.*)\)",
        r"descriptor \1 is \2, which CRIU cannot carry",
        "close it, or run the program without it",
    ),
    (
        r"Can't lookup mount=\S+ for fd=(-?\d+) path=(.*)", r"descriptor \1 (\2) is on none of the container's mounts",
        "close it: it was opened outside of the container, or CRIU cannot carry its kind",
    ),
    (
        r"Can't dump ghost file (.*) of (\d+) size", r"the open file \1 has no name, and \2 bytes",
        "close it, truncate it, or give it a name",
    ),
    (r"fsnotify: Can't find suitable path", "a watch (inotify, fanotify) is on a file without a name", "remove it"),
    (r"packetized mode for pipes", "a pipe is in packet mode (O_DIRECT)", "run the program without such pipes"),
    (r"mqueue isn't empty", "there are POSIX message queues", "close and unlink them (mq_unlink)"),
    # Dumps: mounts.
    (
        r"FS mnt \.?(\S+) dev \S+ root \S+ unsupported", r"CRIU cannot mount the file system at \1 again",
        "unmount it, or make it a bind mount of the bundle",
    ),
    (
        r"\d+:\.?(\S+) doesn't have a proper root mount", r"the mount at \1 comes from outside of the container",
        "unmount it, or name it in the bundle's `mounts`",
    ),
    # Dumps: sockets.
    (r"In-flight connection", "a connection has not been accepted yet", "let the program accept it"),
    (r"Connected TCP socket, consider", "a TCP connection is established", "`--tcp-established` or `--tcp-close`"),
    (
        r"Unsupported proto (\d+) for socket", r"a socket has protocol \1, which CRIU cannot carry",
        "close it (262 is multipath TCP; programs in Go: GODEBUG=multipathtcp=0)",
    ),
    (r"Unknown socket collected \(family (\d+)\)", r"a socket is of family \1, which CRIU cannot carry", "close it"),
    (r"Can't dump corked dgram socket", "a corked UDP socket holds unsent data", "let the program send it"),
    (r"netlink: The socket has data to read", "a netlink socket has unread messages", "read them"),
    (
        r"unix: (?:Dangling connection|External socket is used|Can't dump (?:half of stream|name-less external))",
        "a Unix socket is connected to one outside of the container", "close it, or run its other end in the container",
    ),
    # Restores.
    (
        r"Can't fork for (\d+): Resource temporarily unavailable",
        r"a limit of processes leaves no room for process \1",
        "raise the limit (pids.max, RLIMIT_NPROC, or that of a cgroup above)",
    ),
    (r"Can't fork for (\d+): File exists", r"the process id \1 is in use", "restore it in a pid namespace of its own"),
    (
        r"File (\S+) has bad size (\d+) \(expect (\d+)\)", r"the file /\1 has changed: \2 bytes, not \3",
        _SAME_FILES,
    ),
    (r"File (\S+) has bad (build-ID|mode)", r"the file /\1 has changed: another \2", _SAME_FILES),
    (r"Can't open file (\S+) on restore: (.*)", r"the file /\1 cannot be opened: \2", _SAME_FILES),
    (r"Can't create a temporary directory", "the root file system has no /tmp", "make an empty directory /tmp in it"),
    (r"Failed to open_tree (\S+): (.*)", r"\1 cannot be mounted: \2", "make it, or correct the bundle's `mounts`"),
    (
        r"Failed to move_mount from (\S+) to \S+: Invalid argument", r"\1 cannot be mounted where it was",
        "is it a directory there and a file here, or vice versa?",
    ),
    (r"Can't bind inet socket .*: Address already in use", "a port of the container is in use here", "free it"),
    (r"Can't bind inet socket .*: Cannot assign", "an address of the container does not exist here", "give it one"),
    (r"Head magic doesn't match for (\S+)", r"\1 is not an image of CRIU", _DAMAGED),
    (r"Read \d+ bytes while \d+ expected from (\S+?):?(?: |$)", r"the image \1 is truncated", _DAMAGED),
    (r"Unexpected EOF on|Can't read pages data", "an image is missing or truncated", _DAMAGED),
    (r'execvp\("([^"]+)".*: No such file', r"the program \1 is not installed", r"install \1"),
    (r"(\d+) (?:killed|stopped) by signal 9", r"process \1 was killed", "is there enough memory, and under its limit?"),
)  # fmt: skip


def is_noise(line: str) -> bool:
    """Return True if such an error does not stop CRIU."""
    return _NOISE.match(line) is not None


def find(lines: Sequence[str]) -> tuple[str, str]:
    """Return the cause that the error lines of one log (oldest first) show, and a remedy; "" for what is unknown."""
    lines = [line for line in lines if not is_noise(line)]
    for line in lines:
        for pattern, cause, remedy in _KNOWN:
            if match := re.search(pattern, line):
                return match.expand(cause), match.expand(remedy)
    unknown = [line for line in lines if not _CONSEQUENCE.match(line)] or lines
    return (unknown[-1] if unknown else ""), ""
