"""The cause of a failure, out of error lines as real CRIUs (4.2.1 here, others where it says so) have written them."""

import pytest

from criu_rpc import causes
from criu_rpc.errors import RequestFailed, SwrkDied
from criu_rpc.logs import error_lines

RLIMIT = "(00.014) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted"
TUN = "(00.010) Error (criu/tun.c:85): tun: Unable to create tun: Operation not permitted"
CGROUPD = "(00.354) Error (criu/cgroup.c:2055): cg: cgroupd: recv req error: No such file or directory"
DUMP = "(00.402) Error (criu/cr-dump.c:1975): Dumping FAILED."
RESTORE = "(00.348) Error (criu/cr-restore.c:2331): Restoring FAILED."
FILES = "(00.113) Error (criu/cr-dump.c:1545): Dump files (pid: 285) failed with -1"
RULE = "Error: Could not process rule: No such file or directory"

# What is between the noise at the beginning and the end of a log, the cause, and a word of the remedy.
DUMPS = [
    (
        ["(00.5) Error (criu/fsnotify.c:263): fsnotify: Can't find suitable path for handle (dev 0xdf)", FILES],
        "a watch (inotify, fanotify) is on a file without a name", "remove",
    ),
    (
        ["(00.1) Error (criu/files-reg.c:1790): Can't lookup mount=18 for fd=4 path=/memfd:huge (deleted)", FILES],
        "descriptor 4 (/memfd:huge (deleted)) is on none of the container's mounts", "close",
    ),
    (
        [
            "pie: 2: Error (criu/pie/parasite.c:588): send_fds failed (-22)",
            "(00.3) Error (criu/parasite-syscall.c:280): Can't retrieve FDs from socket",
            "(00.3) Error (compel/src/lib/infect-rpc.c:44): Message reply from daemon is trimmed (12/0)",
            FILES,
        ],
        "a process has an io_uring", "without io_uring",
    ),
    (["(00.3) Error (criu/filesystems.c:650): mqueue isn't empty"], "there are POSIX message queues", "mq_unlink"),
    (
        [
            "(00.1) Error (criu/namespaces.c:460): Can't dump nested user namespace for 487",
            "(00.1) Error (criu/namespaces.c:754): Can't make userns id", RULE,
        ],
        "process 487 has a user namespace of its own", "without",
    ),
    (
        ["(00.1) Error (criu/pipes.c:490): The packetized mode for pipes is not supported yet", FILES],
        "a pipe is in packet mode (O_DIRECT)", "without",
    ),
    (
        ["(00.1) Error (criu/files-ext.c:94): Can't dump file 4 of that type [600] (anon anon_inode:seccomp notify)"],
        "descriptor 4 is anon_inode:seccomp notify, which CRIU cannot carry", "close",
    ),
    (
        [
            "(00.2) Error (criu/proc_parse.c:502): Unknown shit 100600 (/secretmem (deleted))",
            "(00.2) Error (criu/proc_parse.c:738): Can't open 113's mapfile link 7f21d4905000: No such device",
            "(00.2) Error (criu/cr-dump.c:1440): Collect mappings (pid: 113) failed with -1",
        ],
        "/secretmem (deleted) is mapped, which CRIU cannot carry", "without",
    ),
    (
        ["(00.06) Error (compel/src/lib/infect.c:262): Unseizable non-zombie 417 found, state S, err -1/10", RULE],
        "process 417 cannot be frozen: another program traces it", "debugger",
    ),
    (
        [
            "(10.01) Error (criu/cr-dump.c:1808): Timeout reached. Try to interrupt: 0",
            "(10.01) Error (compel/src/lib/infect.c:262): Unseizable non-zombie 108439 found, state D, err -1/4", RULE,
        ],
        "process 108439 sleeps in the kernel (state D) and cannot be frozen", "vfork",
    ),
    (
        ["(00.08) Error (criu/mount.c:724): mnt: FS mnt ./tmp/h dev 0xcc root / unsupported id 47"],
        "CRIU cannot mount the file system at /tmp/h again", "unmount",
    ),
    (
        ["(00.09) Error (criu/mount.c:753): mnt: 47:./tmp/h doesn't have a proper root mount"],
        "the mount at /tmp/h comes from outside of the container", "mounts",
    ),
    (
        ["(00.2) Error (criu/sk-unix.c:479): unix: Dangling connection 1842576", FILES],
        "a Unix socket is connected to one outside of the container", "other end",
    ),
    (
        ["(00.1) Error (criu/files-reg.c:1031): Can't dump ghost file /tmp/g of 629145600 size, increase limit", FILES],
        "the open file /tmp/g has no name, and 629145600 bytes", "truncate",
    ),
    (
        [
            "(00.16) Error (compel/src/lib/infect.c:323): Can't dump the 31227 thread with a pending SIGTRAP.", RULE,
            "(00.18) Error (compel/src/lib/infect.c:417): Unable to detach from 31227: No such process",
        ],
        "a SIGTRAP is pending for thread 31227", "signal",
    ),
    (
        [
            "(00.18) Error (criu/sk-inet.c:185): inet: In-flight connection (l) for 1c6608",
            "(00.18) Error (criu/sk-inet.c:186): inet: In-flight connections can be ignored with the "
            "--skip-in-flight option.",
            FILES,
        ],
        "a connection has not been accepted yet", "accept",
    ),
    (
        [
            "(00.19) Error (criu/sk-inet.c:137): inet: Unsupported proto 262 for socket 1c72a6",
            '(00.19) Error (criu/sk-inet.c:139): inet: For Go programs, consider using "GODEBUG=multipathtcp=0"', FILES,
        ],
        "a socket has protocol 262, which CRIU cannot carry", "GODEBUG",
    ),
    (
        ["(00.15) Error (criu/sk-netlink.c:77): netlink: The socket has data to read", FILES],
        "a netlink socket has unread messages", "read",
    ),
    (
        ["(00.16) Error (criu/sk-inet.c:504): inet: Can't dump corked dgram socket 1cc9a9", FILES],
        "a corked UDP socket holds unsent data", "send",
    ),
    (
        ["(00.2) Error (criu/sockets.c:767): sockets: BUG! Unknown socket collected (family 40)", FILES],
        "a socket is of family 40, which CRIU cannot carry", "close",
    ),
    (
        [
            "(00.1) Error (criu/page-xfer.c:263): page-xfer: Unable to spice data: No space left on device",
            "(00.2) Error (criu/bfd.c:131): bfd: Error flushing image: No space left on device",
            "(00.2) Error (criu/mem.c:718): Can't dump page with parasite",
        ],
        "a disk is full", "room",
    ),
    (
        ["(00.1) Error (criu/seize.c:829): Zombies with threads are not supported"],
        "the first thread of a process has exited, and others run", "wait",
    ),
    # Of CRIU without CAP_SYS_RESOURCE; and 3.15, as in an issue of 2022.
    (
        ["(00.1) Error (criu/parasite-syscall.c:9): Can't get rlimit 0: Operation not permitted"],
        "a process of another user cannot be dumped", "CAP_SYS_RESOURCE",
    ),
    (
        [
            "pie: 9203: Error (criu/pie/parasite.c:429): can't dump unpriviliged task whose /proc doesn't belong to it",
            "pie: 9203: Error (criu/pie/parasite.c:618): can't get /proc fd",
            "(00.008) Error (compel/src/lib/infect-rpc.c:72): Command 76 for daemon failed with -1",
        ],
        "a process of another user cannot be dumped", "CAP_SYS_RESOURCE",
    ),
]  # fmt: skip
RESTORES = [
    (
        [
            "(00.21)      1: Error (criu/files-reg.c:2353): Can't open file etc/gone on restore: Permission denied",
            "(00.21)      1: Error (criu/files-reg.c:2267): Can't open file etc/gone: No such file or directory",
            "(00.21)      1: Error (criu/files.c:1221): Unable to open fd=5 id=0x5",
        ],
        "the file /etc/gone cannot be opened: Permission denied", "both hosts",
    ),
    (
        [
            "(00.34)      1: Error (criu/files-reg.c:2175): File etc/gone has bad size 12 (expect 5)",
            "(00.34)      1: Error (criu/files.c:1221): Unable to open fd=5 id=0x5",
        ],
        "the file /etc/gone has changed: 12 bytes, not 5", "both hosts",
    ),
    (
        ["(00.2)      1: Error (criu/mount.c:2955): mnt: Can't create a temporary directory: Read-only file system"],
        "the root file system has no /tmp", "empty directory",
    ),
    (
        ["(00.09) Error (criu/protobuf.c:72): Unexpected EOF on (empty-image)"],
        "an image is missing or truncated", "again",
    ),
    (
        [
            "(00.3)      1: Error (criu/protobuf.c:93): Read 8 bytes while 523 expected from /i/mm-1.img: "
            "No such file or directory"
        ],
        "the image /i/mm-1.img is truncated", "again",
    ),
    (
        ["(00.1) Error (criu/image.c:554): Head magic doesn't match for pstree.img"],
        "pstree.img is not an image of CRIU", "again",
    ),
    (
        ["(00.347) pie: 1: Error (criu/pie/restorer.c:1907): Can't read pages data (-9)"],
        "an image is missing or truncated", "again",
    ),
    (
        [
            "(00.1)      1: Error (criu/sk-inet.c:1059): inet: Can't bind inet socket (id 12): Address already in use",
            "(00.1)      1: Error (criu/files.c:1221): Unable to open fd=3 id=0xc",
        ],
        "a port of the container is in use here", "free",
    ),
    (
        ["(00.1)      1: Error (criu/mount-v2.c:319): mnt-v2: Failed to open_tree /data: No such file or directory"],
        "/data cannot be mounted: No such file or directory", "make it",
    ),
    (
        [
            "(00.4)      1: Error (criu/mount-v2.c:324): mnt-v2: Failed to move_mount from /data to "
            "/tmp/.criu.mntns.8IGraT/mnt-0000000860: Invalid argument"
        ],
        "/data cannot be mounted where it was", "directory",
    ),
    (
        ["(00.1)      1: Error (criu/cr-restore.c:1233): Can't fork for 3: Resource temporarily unavailable"],
        "a limit of processes leaves no room for process 3", "pids.max",
    ),
    (["(00.1) Error (criu/cr-restore.c:1233): Can't fork for 9: File exists"], "the process id 9 is in use", "pid"),
    # 2.x and 3.x, as in issues.
    (["(01.328) Error (cr-restore.c:978): 3127 killed by signal 9: Killed"], "process 3127 was killed", "memory"),
    (
        ['(00.1) Error (criu/util.c:626): execvp("iptables-restore", ...) failed: No such file or directory'],
        "the program iptables-restore is not installed", "install iptables-restore",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "cause", "remedy"), DUMPS)
def test_dumps(lines: list[str], cause: str, remedy: str) -> None:
    error = RequestFailed("dump", 0, log_tail=error_lines("\n".join([RLIMIT, *lines, DUMP])))
    assert str(error) == f"criu failed to dump: {cause}"
    assert error.remedy is not None
    assert remedy in error.remedy.splitlines()[0]


@pytest.mark.parametrize("last", [[RESTORE], [RESTORE, CGROUPD], [CGROUPD, RESTORE]])
@pytest.mark.parametrize(("lines", "cause", "remedy"), RESTORES)
def test_restores(lines: list[str], cause: str, remedy: str, last: list[str]) -> None:
    """What ends last, CRIU or its helper, is a matter of chance."""
    error = RequestFailed("restore", 0, log_tail=error_lines("\n".join([TUN, RLIMIT, *lines, *last])))
    assert str(error) == f"criu failed to restore: {cause}"
    assert error.remedy is not None
    assert remedy in error.remedy.splitlines()[0]
    assert "criu: tun" not in error.remedy


def test_of_unknown_lines_the_last_that_says_something_decides() -> None:
    lines = [TUN, RLIMIT, "(0.1) Error (criu/x.c:1): one thing", "(0.1) Error (criu/x.c:2): another", FILES, DUMP]
    assert causes.find(error_lines("\n".join(lines))) == ("another", "")
    assert causes.find(error_lines("\n".join([RLIMIT, FILES, DUMP]))) == ("Dumping FAILED.", "")
    assert causes.find(()) == ("", "")


def test_noise_is_not_a_cause_of_death() -> None:
    error = SwrkDied("restore", -9, log_tail=error_lines("\n".join([TUN, RLIMIT, CGROUPD])))
    assert str(error) == "criu was killed by SIGKILL in the middle of restore"


def test_names_of_files_cannot_control_a_terminal() -> None:
    (line,) = error_lines("(0.1) Error (criu/x.c:1): Can't open file \x1b[2Jx" + "y" * 9999 + " on restore: no")
    assert line.isprintable()
    assert len(line) == 500
