"""pymigrate restore ID: make a running container of CRIU's image files, as runc does."""

from __future__ import annotations

import os

from migrate.cli.flags import Flag, Syntax
from migrate.commands import checkpoint, create

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

SYNTAX = Syntax(
    "Make a running container of image files, in the foreground unless --detach.",
    (
        *checkpoint.FLAGS,
        Flag("bundle", "the bundle (default: here)", "str", short="b", metavar="DIR", default="."),
        Flag("detach", "return when it runs", short="d"),
        Flag("pid-file", "write the pid of the container's init to FILE", "str", metavar="FILE"),
        Flag("console-socket", "send the master of its terminal to this Unix socket", "str", metavar="PATH"),
        Flag("parent-path", "accepted for runc's sake: the images know their parent", "str", metavar="DIR"),
        Flag("lsm-profile", "TYPE:NAME, the label of its processes (apparmor or selinux)", "str", metavar="PROFILE"),
        Flag("lsm-mount-context", "the SELinux context of its mounts", "str", metavar="CONTEXT"),
        Flag("net", create.NET_HELP, "str", metavar="NET"),
        Flag("no-subreaper", "accepted for runc's sake"),
        Flag("no-pivot", "accepted for runc's sake"),
    ),
    ("id",),
)


def run(args: Values) -> int:
    from migrate.errors import UsageError
    from runtime.checkpoint import runc_restore
    from runtime.state.store import Store

    images, work = checkpoint.paths(args)
    if not os.path.isdir(images):
        raise UsageError(f"--image-path {images}: is no directory")
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
