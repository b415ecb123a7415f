"""pymigrate create ID: create a container from a bundle, for `start`."""

from __future__ import annotations

from migrate.cli.flags import Flag, Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values
    from runtime.lifecycle.create import Options

NET_HELP = "bridge=BRIDGE,ip=ADDRESS/LENGTH[,gw=][,mac=][,name=][,mtu=] | host | none | ns:PATH (docs/network.md)"
FLAGS = (
    Flag("bundle", "the bundle directory (default: the current one)", "str", short="b", metavar="DIR", default="."),
    Flag("pid-file", "write the pid of the container's init to FILE", "str", metavar="FILE"),
    Flag("console-socket", "send the master of the container's terminal to this Unix socket", "str", metavar="PATH"),
    Flag("pidfd-socket", "send a pidfd of the container's init to this Unix socket", "str", metavar="PATH"),
    Flag(
        "preserve-fds",
        "pass N more descriptors, after those of $LISTEN_FDS, to the program",
        "int",
        metavar="N",
        default=0,
    ),
    Flag(
        "no-pivot",
        "do not use pivot_root, for a host on its initial ramdisk; CAP_SYS_ADMIN can then reach it",
    ),
    Flag("net", NET_HELP, "str", metavar="NET"),
    Flag("no-new-keyring", "keep the caller's session keyring"),
)
SYNTAX = Syntax("Create a container from a bundle. `start` runs its program.", FLAGS, ("id",))


def options(args: Values) -> Options:
    from runtime.lifecycle.create import Options

    listening = _listening()
    require_open(args.preserve_fds, listening)
    names = ("pid_file", "console_socket", "pidfd_socket", "no_pivot", "no_new_keyring", "net")
    return Options(
        **{name: args.__dict__[name] for name in names}, preserve_fds=listening + args.preserve_fds,
        listen_fds=listening, systemd=args.systemd_cgroup,
    )  # fmt: skip


def _listening() -> int:
    """Return how many sockets, from descriptor 3 on, systemd passed to this process (sd_listen_fds(3))."""
    import os

    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal() or len(count) > 5:
        return 0
    return int(count)


def require_open(count: int, listening: int = 0) -> None:
    """Raise UsageError for a descriptor that the caller has not opened: one of pymigrate's would take its place.

    `count` is the value of --preserve-fds, `listening` that of $LISTEN_FDS.
    """
    import os

    from migrate.errors import UsageError

    for fd in range(3, 3 + listening + count):
        try:
            os.fstat(fd)
        except OSError:
            said = f"LISTEN_FDS={listening}" if fd < 3 + listening else f"--preserve-fds {count}"
            raise UsageError(f"{said}: descriptor {fd} is not open") from None


def run(args: Values) -> int:
    from runtime.lifecycle import create
    from runtime.state.store import Store

    create.create(Store(args.root), args.id, args.bundle, options(args))
    return 0
