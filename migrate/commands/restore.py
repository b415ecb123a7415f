"""pymigrate restore ID: restore a container from CRIU's image files, as runc does."""

from __future__ import annotations

import os

from migrate.cli.flags import Flag, Syntax
from migrate.commands import checkpoint, create

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

SYNTAX = Syntax(
    "Restore a container from image files, in the foreground unless --detach is given.",
    (
        *checkpoint.FLAGS,
        Flag("bundle", "the bundle directory (default: the current one)", "str", short="b", metavar="DIR", default="."),
        Flag("detach", "return once it runs", short="d"),
        Flag("pid-file", "write the pid of the container's init to FILE", "str", metavar="FILE"),
        Flag(
            "console-socket", "send the master of the container's terminal to this Unix socket", "str", metavar="PATH"
        ),
        Flag(
            "parent-path",
            "accepted for compatibility with runc and ignored: the images name their parent",
            "str",
            metavar="DIR",
        ),
        Flag("lsm-profile", "label of the processes as TYPE:NAME (apparmor or selinux)", "str", metavar="PROFILE"),
        Flag("lsm-mount-context", "SELinux context of the mounts", "str", metavar="CONTEXT"),
        Flag("net", create.NET_HELP, "str", metavar="NET"),
        Flag("no-subreaper", "accepted for compatibility with runc and ignored"),
        Flag("no-pivot", "accepted for compatibility with runc and ignored"),
    ),
    ("id",),
)


def run(args: Values) -> int:
    from migrate.errors import UsageError
    from runtime.checkpoint import runc_restore
    from runtime.state.store import Store

    images, work = checkpoint.paths(args)
    if not os.path.isdir(images):
        raise UsageError(f"--image-path {images}: not a directory")
    chosen = checkpoint.options(args)
    for name in ("lsm_profile", "lsm_mount_context"):
        if args.__dict__[name]:
            chosen[name] = args.__dict__[name]
    if args.lazy_pages:
        chosen["lazy_pages"] = True
    request = runc_restore.Request(
        images=images, work=work, detach=args.detach, pid_file=args.pid_file, console_socket=args.console_socket,
        systemd=args.systemd_cgroup, net=args.net, options=chosen,
    )  # fmt: skip
    return runc_restore.restore(Store(args.root), args.id, args.bundle, request)
