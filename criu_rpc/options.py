"""The options of a dump, a pre-dump or a restore, and how they are written into a criu_req.

Descriptors: `images_dir_fd` and `work_dir_fd` are those of the caller: CRIU opens /proc/<pid of the process that made
the socketpair>/fd/<n> (criu/cr-service.c, setup_opts_from_req). `page_server_fd` and the descriptors of `inherit_fd`
are numbers in the CRIU process itself, which must have inherited them.
"""

import enum
from dataclasses import dataclass
from typing import Any

from criu_rpc import messages


class ManageCgroups(enum.StrEnum):
    """How CRIU treats cgroups; IGNORE neither dumps nor restores any."""

    IGNORE = "IGNORE"
    SOFT = "SOFT"
    FULL = "FULL"
    STRICT = "STRICT"


@dataclass(frozen=True, kw_only=True)
class _Common:
    images_dir_fd: int
    work_dir_fd: int
    log_file: str
    log_level: int = 4
    root: str | None = None
    external: tuple[str, ...] = ()
    tcp_established: bool = False
    file_locks: bool = False
    ext_unix_sk: bool = False
    shell_job: bool = False
    link_remap: bool = False
    manage_cgroups: ManageCgroups = ManageCgroups.IGNORE
    ghost_limit: int | None = None
    orphan_pts_master: bool = False
    empty_ns: int | None = None
    lsm_profile: str | None = None
    lsm_mount_context: str | None = None
    tcp_close: bool = False
    auto_dedup: bool = False

    def fill(self, opts: Any) -> None:
        """Write these options into a criu_opts message."""
        rpc = messages.rpc()
        opts.images_dir_fd = self.images_dir_fd
        opts.work_dir_fd = self.work_dir_fd
        opts.log_file = self.log_file
        opts.log_level = self.log_level
        if self.root is not None:
            opts.root = self.root
        opts.external.extend(self.external)
        opts.tcp_established = self.tcp_established
        opts.file_locks = self.file_locks
        opts.ext_unix_sk = self.ext_unix_sk
        opts.shell_job = self.shell_job
        opts.link_remap = self.link_remap
        opts.manage_cgroups = True
        opts.manage_cgroups_mode = rpc.criu_cg_mode.Value(self.manage_cgroups.value)
        opts.network_lock = rpc.NFTABLES
        # Older versions do not know all of these: only what is wanted is asked for.
        for name in ("ghost_limit", "empty_ns", "lsm_profile", "lsm_mount_context"):
            if getattr(self, name) is not None:
                setattr(opts, name, getattr(self, name))
        for name in ("orphan_pts_master", "tcp_close", "auto_dedup"):
            if getattr(self, name):
                setattr(opts, name, True)


@dataclass(frozen=True, kw_only=True)
class DumpOptions(_Common):
    """`pid` is the root of the tree; the page server on `page_server_fd`, or at an address, gets the pages.

    `irmap_scan_paths` are names of watched files that CRIU cannot find by their handles.

    `seize_timeout` is how long CRIU tries to stop all threads, in seconds (criu/seize.c; CRIU's own default is 10).

    `status_fd` gets a null byte when a lazy dump's page server is ready; it is a number in the CRIU process.

    With `lazy_pages`, CRIU ignores a page server of the request (criu/cr-service.c). `config_file` is then a file that
    names `page_server_fd` (`page_server_config`): what cannot be lazy goes there.
    """

    pid: int
    log_file: str = "dump.log"
    leave_running: bool = False
    page_server_fd: int | None = None
    page_server: tuple[str, int] | None = None
    lazy_pages: bool = False
    config_file: str | None = None
    tcp_skip_in_flight: bool = False
    status_fd: int | None = None
    parent_img: str | None = None
    track_mem: bool = False
    irmap_scan_paths: tuple[str, ...] = ()
    seize_timeout: int | None = None

    def fill(self, opts: Any) -> None:
        super().fill(opts)
        opts.pid = self.pid
        for name in (
            "leave_running", "track_mem", "lazy_pages", "tcp_skip_in_flight",
        ):  # fmt: skip
            if getattr(self, name):
                setattr(opts, name, True)
        for name in ("parent_img", "status_fd", "config_file"):
            if getattr(self, name) is not None:
                setattr(opts, name, getattr(self, name))
        if self.seize_timeout is not None:
            opts.timeout = self.seize_timeout
        if self.irmap_scan_paths:
            opts.force_irmap = True
            opts.irmap_scan_paths.extend(self.irmap_scan_paths)
        if self.page_server is not None:
            opts.ps.address, opts.ps.port = self.page_server
        if self.page_server_fd is not None and not self.lazy_pages:
            opts.ps.fd = self.page_server_fd
            opts.ps.port = 0

    @property
    def inherited(self) -> tuple[int, ...]:
        """Descriptors that the CRIU process must inherit."""
        return tuple(fd for fd in (self.page_server_fd, self.status_fd) if fd is not None)


def page_server_config(fd: int) -> str:
    """Return the text of a configuration file that has CRIU send pages to the descriptor `fd` of its process."""
    return f"page-server\nps-socket {fd}\n"


@dataclass(frozen=True, kw_only=True)
class RestoreOptions(_Common):
    """`inherit_fd` pairs CRIU's name of a file ("pipe:[123]", an external namespace's key) with a descriptor."""

    log_file: str = "restore.log"
    rst_sibling: bool = True
    inherit_fd: tuple[tuple[str, int], ...] = ()
    lazy_pages: bool = False

    def fill(self, opts: Any) -> None:
        super().fill(opts)
        opts.rst_sibling = self.rst_sibling
        opts.lazy_pages = self.lazy_pages
        for key, fd in self.inherit_fd:
            entry = opts.inherit_fd.add()
            entry.key, entry.fd = key, fd

    @property
    def inherited(self) -> tuple[int, ...]:
        """Descriptors that the CRIU process must inherit, under these very numbers."""
        return tuple(fd for _, fd in self.inherit_fd)
