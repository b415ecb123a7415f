"""Write the id maps of user namespaces (user_namespaces(7)) from outside, as root or with newuidmap(1)."""

from __future__ import annotations

import os

from runtime.errors import StartFailed
from runtime.linux import syscalls
from runtime.linux.files import write as write_kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.spec.mounts import IdMapping

TOOL_TIMEOUT = 20.0


def write(pid: int, uids: tuple[IdMapping, ...], gids: tuple[IdMapping, ...]) -> None:
    """Write the maps of the user namespace that `pid` is in. Raises StartFailed naming the field."""
    for field, name, tool, mappings in (
        ("linux.uidMappings", "uid_map", "newuidmap", uids),
        ("linux.gidMappings", "gid_map", "newgidmap", gids),
    ):
        ours = os.geteuid() if name == "uid_map" else os.getegid()
        if os.geteuid() == 0:
            _write(f"/proc/{pid}/{name}", mappings, field)
        elif len(mappings) == 1 and mappings[0].size == 1 and mappings[0].host == ours:
            if name == "gid_map":
                _write_file(f"/proc/{pid}/setgroups", "deny", field)
            _write(f"/proc/{pid}/{name}", mappings, field)
        else:
            _run_tool(tool, pid, mappings, field)


def _write(path: str, mappings: tuple[IdMapping, ...], field: str) -> None:
    _write_file(path, "".join(f"{item.container} {item.host} {item.size}\n" for item in mappings), field)


def _write_file(path: str, text: str, field: str) -> None:
    try:
        write_kernel(path, text)
    except OSError as error:
        raise StartFailed(f"{field}: the kernel rejects {', '.join(text.splitlines())}: {error.strerror}") from None


def _run_tool(tool: str, pid: int, mappings: tuple[IdMapping, ...], field: str) -> None:
    import subprocess

    numbers = [str(number) for item in mappings for number in (item.container, item.host, item.size)]
    try:
        done = subprocess.run([tool, str(pid), *numbers], capture_output=True, text=True, timeout=TOOL_TIMEOUT)
    except FileNotFoundError:
        raise StartFailed(
            f"{field}: {tool} is not installed", remedy="apt-get install uidmap, and list the ids in /etc/subuid"
        ) from None
    except subprocess.TimeoutExpired:
        raise StartFailed(f"{field}: {tool} did not exit within {TOOL_TIMEOUT:g} s") from None
    if done.returncode:
        raise StartFailed(f"{field}: {done.stderr.strip() or tool + ' failed'}")


def namespace(uids: tuple[IdMapping, ...], gids: tuple[IdMapping, ...]) -> int:
    """Return a descriptor of a user namespace with these maps and no process in it. Raises StartFailed."""
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(go[1])
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            os.write(ready[1], b"1")
            os.read(go[0], 1)
        finally:
            os._exit(0)
    try:
        os.close(ready[1])
        if not os.read(ready[0], 1):
            raise StartFailed("linux.namespaces: a user namespace cannot be made for a mount's id mappings")
        write(pid, uids, gids)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for fd in (ready[0], *go):
            os.close(fd)
        os.waitpid(pid, 0)
