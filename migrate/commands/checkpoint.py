"""pymigrate checkpoint ID: save a running container to CRIU's image files, as runc does."""

from __future__ import annotations

import os

from migrate.cli.flags import Flag, Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from migrate.cli.flags import Values

# Those that `restore` has as well.
FLAGS = (
    Flag("image-path", "where the images are (default: ./checkpoint)", "str", metavar="DIR"),
    Flag("work-path", "where CRIU's log goes (default: beside the images)", "str", metavar="DIR"),
    Flag("tcp-established", "carry established TCP connections"),
    Flag("tcp-close", "do not restore TCP connections: they are closed"),
    Flag("ext-unix-sk", "let the other end of a Unix socket be outside"),
    Flag("shell-job", "let the terminal be one from outside"),
    Flag("file-locks", "carry file locks"),
    Flag("lazy-pages", "leave the memory behind, to be fetched page by page"),
    Flag("manage-cgroups-mode", "what CRIU does about cgroups; ours are made anew in any case", "str",
         choices=("soft", "full", "strict", "ignore")),
    Flag("empty-ns", "make this namespace, but leave its contents out", "list", metavar="NAMESPACE"),
    Flag("auto-dedup", "free what a parent's images hold twice"),
    Flag("link-remap", "accepted for runc's sake: always done"),
)  # fmt: skip
SYNTAX = Syntax(
    "Save a running container to image files; it is gone afterwards, unless --leave-running or --pre-dump.",
    (
        *FLAGS,
        Flag("parent-path", "images of a pre-dump, seen from the image path", "str", metavar="DIR"),
        Flag("pre-dump", "save only the memory that has changed; the container goes on"),
        Flag("leave-running", "let the container go on"),
        Flag("tcp-skip-in-flight", "leave out TCP connections that are being made"),
        Flag("page-server", "send the memory to a page server", "str", metavar="ADDRESS:PORT"),
        Flag("status-fd", "write a null byte to this descriptor when --lazy-pages can begin", "int", metavar="FD"),
    ),
    ("id",),
)
_NETWORK = 0x40000000  # CLONE_NEWNET, as CRIU's empty_ns has it


def paths(args: Values) -> tuple[str, str]:
    """Image and work path, absolute."""
    images = os.path.abspath(args.image_path or "checkpoint")
    return images, os.path.abspath(args.work_path) if args.work_path else images


def options(args: Values) -> dict[str, Any]:
    """The options of CRIU that a dump and a restore have in common."""
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
            raise UsageError(f"--empty-ns {name}: only network is possible")
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
