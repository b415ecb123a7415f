"""Which of the error lines in CRIU's log is the cause of a failure, in words that a user understands.

CRIU prints errors of probes that it goes on after, then the cause, then what follows from it at each level above. So a
line that is known decides, the first of them; among unknown ones the last that is neither noise nor a consequence.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# CRIU goes on after these: probes of the kernel, what it lacks the privilege for, its own clean-up.
_NOISE = re.compile(
    r"rlimit: Can't setup RLIMIT_NOFILE"
    r"|tun: (?:Unable to create tun|Can't check tun support|No proper support for tun)"
    r"|cg: cgroupd: recv req error"
    r"|sockets: Diag module missing"
    r"|exited, status=\d+$"
    r"|Unable to detach from \d+: No such process"
)
# What a failure below makes of the levels above it.
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
_DAMAGED = "make the images anew; those of a snapshot: `pymigrate snapshot show DIR`"

# What CRIU says, what it means, and what to do about it.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    # Anywhere.
    (r"No space left on device|Disk quota exceeded", "no room on a disk is left for it", "make room there"),
    (r"vdso: Unexpected rt vDSO area bounds", "this CRIU is too old for this kernel", "run vagrant/provision.sh"),
    (r"page-xfer: .*(?:Broken pipe|Connection reset)", "the connection that takes the memory pages was lost", ""),
    # Dumps: processes.
    (
        r"Unseizable non-zombie (\d+) found, state D",
        r"process \1 sleeps in the kernel (state D) and cannot be frozen",
        "wait until it goes on; the parent of a vfork waits for its child",
    ),
    (
        r"Unseizable non-zombie (\d+) found, state", r"process \1 cannot be frozen: another program traces it",
        "detach the debugger (strace, gdb)",
    ),
    (
        r"Can't dump the (\d+) thread with a pending SIGTRAP", r"a SIGTRAP waits for thread \1",
        "let the program take the signal: it is blocked",
    ),
    (
        r"Can't get rlimit \d+: Operation not permitted|unpriviliged task whose /proc",
        "a process of another user cannot be dumped",
        "CRIU needs CAP_SYS_RESOURCE for it, which this host's root lacks",
    ),
    (
        r"session leader of (?:zombie process )?(\d+)\(\d+\) is outside",
        r"the session of process \1 is not the container's",
        "start it with setsid",
    ),
    (r"Can't dump nested (\w+) namespace for (\d+)", r"process \2 has a \1 namespace of its own", "run it without"),
    (
        r"Zombies with threads are not supported", "a process has ended its first thread, while others of it run",
        "have the first thread wait for the others",
    ),
    (r"Found dangling tty", "a terminal of a process is not the container's", "`checkpoint --shell-job`"),
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
        "close it: it was opened outside of the container, or is of a kind that CRIU cannot carry",
    ),
    (
        r"Can't dump ghost file (.*) of (\d+) size", r"the open file \1 has no name any more, and \2 bytes",
        "close it, let it get smaller, or give it a name",
    ),
    (r"fsnotify: Can't find suitable path", "a watch (inotify, fanotify) is on a file without a name", "remove it"),
    (r"packetized mode for pipes", "a pipe is one of packets (O_DIRECT)", "run the program without"),
    (r"mqueue isn't empty", "there are POSIX message queues", "close and unlink them (mq_unlink)"),
    # Dumps: mounts.
    (
        r"FS mnt \.?(\S+) dev \S+ root \S+ unsupported", r"CRIU cannot mount again what is mounted at \1",
        "unmount it, or make it a bind mount of the bundle's",
    ),
    (
        r"\d+:\.?(\S+) doesn't have a proper root mount", r"what is mounted at \1 comes from outside of the container",
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
    (r"Can't dump corked dgram socket", "a UDP socket holds back what it is to send", "let the program send it"),
    (r"netlink: The socket has data to read", "a netlink socket has messages that nobody has read", "read them"),
    (
        r"unix: (?:Dangling connection|External socket is used|Can't dump (?:half of stream|name-less external))",
        "a Unix socket is connected to one outside of the container", "close it, or run its other end in the container",
    ),
    # Restores.
    (
        r"Can't fork for (\d+): Resource temporarily unavailable", r"no room for process \1 under a limit of processes",
        "raise the limit (pids.max, RLIMIT_NPROC, or that of a cgroup above)",
    ),
    (r"Can't fork for (\d+): File exists", r"the process id \1 is in use", "restore it in a pid namespace of its own"),
    (
        r"File (\S+) has bad size (\d+) \(expect (\d+)\)", r"the file /\1 is not what it was: \2 bytes, not \3",
        _SAME_FILES,
    ),
    (r"File (\S+) has bad (build-ID|mode)", r"the file /\1 is not what it was: another \2", _SAME_FILES),
    (r"Can't open file (\S+) on restore: (.*)", r"the file /\1 cannot be opened: \2", _SAME_FILES),
    (r"Can't create a temporary directory", "the root file system has no /tmp", "make an empty directory /tmp in it"),
    (r"Failed to open_tree (\S+): (.*)", r"\1 cannot be mounted: \2", "make it, or correct the bundle's `mounts`"),
    (
        r"Failed to move_mount from (\S+) to \S+: Invalid argument", r"\1 cannot be mounted where it was",
        "is it a directory there and a file here, or the other way round?",
    ),
    (r"Can't bind inet socket .*: Address already in use", "a port of the container is in use here", "free it"),
    (r"Can't bind inet socket .*: Cannot assign", "an address of the container does not exist here", "give it one"),
    (r"Head magic doesn't match for (\S+)", r"the image \1 is not one of CRIU's", _DAMAGED),
    (r"Read \d+ bytes while \d+ expected from (\S+?):?(?: |$)", r"the image \1 is cut short", _DAMAGED),
    (r"Unexpected EOF on|Can't read pages data", "an image is missing or cut short", _DAMAGED),
    (r'execvp\("([^"]+)".*: No such file', r"the program \1 is not installed", r"install \1"),
    (r"(\d+) (?:killed|stopped) by signal 9", r"process \1 was killed", "is there enough memory, and under its limit?"),
)  # fmt: skip


def is_noise(line: str) -> bool:
    """Whether CRIU goes on after such an error."""
    return _NOISE.match(line) is not None


def find(lines: Sequence[str]) -> tuple[str, str]:
    """The cause that error lines of one log tell of, oldest first, and a remedy; each "" when there is none."""
    lines = [line for line in lines if not is_noise(line)]
    for line in lines:
        for pattern, cause, remedy in _KNOWN:
            if match := re.search(pattern, line):
                return match.expand(cause), match.expand(remedy)
    unknown = [line for line in lines if not _CONSEQUENCE.match(line)] or lines
    return (unknown[-1] if unknown else ""), ""
