"""pymigrate checkpoint ID: save a running container to CRIU's image files, as runc does."""

from __future__ import annotations

import os

from migrate.cli.flags import Flag, Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from migrate.cli.flags import Values

# The flags that `restore` has too.
FLAGS = (
    Flag("image-path", "directory of the images (default: ./checkpoint)", "str", metavar="DIR"),
    Flag("work-path", "directory of CRIU's log (default: that of the images)", "str", metavar="DIR"),
    Flag("tcp-established", "carry established TCP connections"),
    Flag("tcp-close", "close TCP connections instead of restoring them"),
    Flag("ext-unix-sk", "allow Unix sockets whose other end is outside the container"),
    Flag("shell-job", "allow a terminal from outside the container"),
    Flag("file-locks", "carry file locks"),
    Flag("lazy-pages", "leave the memory to be fetched page by page"),
    Flag("manage-cgroups-mode", "how CRIU treats cgroups; pymigrate always makes new ones", "str",
         choices=("soft", "full", "strict", "ignore")),
    Flag("empty-ns", "make this namespace without its contents", "list", metavar="NAMESPACE"),
    Flag("auto-dedup", "free pages in parent images that newer images replace"),
    Flag("link-remap", "accepted for compatibility with runc: always on"),
)  # fmt: skip
SYNTAX = Syntax(
    "Save a running container to image files and end it, unless --leave-running or --pre-dump is given.",
    (
        *FLAGS,
        Flag("parent-path", "images of a pre-dump, relative to the image path", "str", metavar="DIR"),
        Flag("pre-dump", "save only changed memory; the container keeps running"),
        Flag("leave-running", "leave the container running"),
        Flag("tcp-skip-in-flight", "drop TCP connections that the program has not accepted yet"),
        Flag("page-server", "send the memory to a page server", "str", metavar="ADDRESS:PORT"),
        Flag("status-fd", "write a null byte to this descriptor when --lazy-pages is ready", "int", metavar="FD"),
    ),
    ("id",),
)
_NETWORK = 0x40000000  # CLONE_NEWNET, as CRIU's empty_ns has it


def paths(args: Values) -> tuple[str, str]:
    """Return the absolute image and work paths."""
    images = os.path.abspath(args.image_path or "checkpoint")
    return images, os.path.abspath(args.work_path) if args.work_path else images


def options(args: Values) -> dict[str, Any]:
    """Return the CRIU options that a dump and a restore share. Raises UsageError."""
    from migrate.errors import UsageError

    chosen: dict[str, Any] = {
        name: args.__dict__[name] for name in ("tcp_established", "ext_unix_sk", "shell_job", "file_locks")
    }
    for name in ("tcp_close", "auto_dedup"):
        if args.__dict__[name]:
            chosen[name] = True
    if args.manage_cgroups_mode:
        from criu_rpc.options import ManageCgroups

        chosen["manage_cgroups"] = ManageCgroups(args.manage_cgroups_mode.upper())
    for name in args.empty_ns:
        if name != "network":
            raise UsageError(f"--empty-ns {name}: only `network` is supported")
        chosen["empty_ns"] = _NETWORK
    return chosen


def run(args: Values) -> int:
    from migrate.errors import UsageError
    from runtime.checkpoint import runc_checkpoint
    from runtime.state.store import Store

    images, work = paths(args)
    chosen = options(args)
    for name in ("tcp_skip_in_flight", "lazy_pages"):
        if args.__dict__[name]:
            chosen[name] = True
    if args.status_fd is not None:
        chosen["status_fd"] = args.status_fd
    if args.page_server:
        address, _, port = args.page_server.rpartition(":")
        if not address or not port.isdigit():
            raise UsageError(f"--page-server {args.page_server}: must be ADDRESS:PORT")
        chosen["page_server"] = (address, int(port))
    request = runc_checkpoint.Request(
        images=images, work=work, parent=args.parent_path, pre_dump=args.pre_dump, leave_running=args.leave_running,
        options=chosen,
    )  # fmt: skip
    runc_checkpoint.checkpoint(Store(args.root), args.id, request)
    return 0
