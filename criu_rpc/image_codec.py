"""Read and change CRIU's image files, in protobuf's wire format.

Terminals whose master is outside, such as a container's console:
- CRIU dumps a descriptor of /dev/tty only while the session's leader is in the foreground ("ctty inheritance
  detected"), thus not of a shell while a job of it is. It is dumped as an external terminal (`tty_external`) instead.
- If two files are open on such a terminal, CRIU takes one for the master, and restores no controlling terminal.
Here all of them become descriptors of one open file of the terminal, which has the same effect.

Mounts of a source outside that has been removed or replaced since: CRIU would make it anew, empty, where it is told to
take it from, and remove it afterwards. Here they become mounts of what is there now.

Threads that wait in poll(2) without a timeout: the kernel would resume such a call from what it has noted
(ERESTART_RESTARTBLOCK). CRIU makes it fail with EINTR, which programs such as `tail -f` take for an error, because no
handler of theirs has run. Without a timeout nothing is lost when the call is made again.

pycriu's generated messages would do the same, but they import 43 modules in 16 ms, or in 295 ms with the pure-Python
protobuf that a target has. This module imports in 0.4 ms. `connections` of 500 sockets takes 10 ms here, 1.8 ms with
protobuf's C library and 68 ms without it (criu 4, least of 15). It is called while the container is frozen.

An image file is 8 bytes of magic numbers, then entries: a length (4 bytes, little endian) and a message.
(criu/tty.c, criu/mount-v2.c, compel/arch/x86/src/lib/infect.c; images/core-x86.proto, images/fdinfo.proto,
images/tty.proto, images/inventory.proto, images/sk-inet.proto, images/mnt.proto, images/pagemap.proto,
images/mm.proto, images/vma.proto)
"""

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator

from criu_rpc.errors import CriuError

_FILES, _INFO, _DESCRIPTORS, _MOUNTS = "files.img", "tty-info.img", "fdinfo-", "mountpoints-"
_TTY = 0x500  # the device number of /dev/tty
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Fields of fdinfo_entry, file_entry, tty_file_entry and tty_info_entry.
_FD_FILE = 1
_FILE_ID, _FILE_TTY = 2, 19
_TTY_INFO, _TTY_FLAGS = 2, 3
_INFO_ID, _INFO_TYPE, _INFO_SID, _INFO_RDEV = 1, 2, 6, 8
_PTY, _EXTERNAL = 1, 5
_MOUNT_DELETED, _MOUNT_KEY = 16, 18  # of mnt_entry

# Of inventory_entry, file_entry and inet_sk_entry.
_INVENTORY = "inventory.img"
_DUMP_ID = 13
_FILE_INET = 4
_SK_FAMILY, _SK_PROTOCOL, _SK_STATE, _SK_PORTS, _SK_ADDRESSES = 3, 5, 6, (7, 8), (11, 12)
_CLOSE, _LISTEN = 7, 10
_MAPPED = bytes(10) + b"\xff\xff"  # an IPv4 address in an IPv6 socket

# Of pagemap_entry, mm_entry and vma_entry.
_PAGEMAP, _MAPPINGS = "pagemap-", "mm-"
_PAGES_AT, _PAGES_COMPAT, _PAGES_FLAGS, _PAGES = 1, 2, 4, 5
_MM_VMAS = 14
_VMA_START, _VMA_END, _VMA_FLAGS, _VMA_STATUS = 1, 2, 6, 7

# Of core_entry, thread_info_x86 and user_x86_regs_entry.
_CORES = "core-"
_CORE_X86, _X86_REGISTERS = 2, 2
_AX, _DX, _SI, _ORIG_AX, _IP, _MODE = 11, 13, 14, 16, 17, 28
_COMPAT = 2
_INTERRUPTED = b"\x58\xfc" + b"\xff" * 8 + b"\x01"  # the field ax, with -EINTR
_POLL, _RESTART, _SYSCALL_SIZE = 7, 219, 2
# If a call has been restarted before, the kernel no longer tells which call it was. Its second argument does: it is a
# number of descriptors for poll, one of these operations for futex (WAIT, WAIT_BITSET), an address for nanosleep.
_FUTEX_WAITS = {operation | flags for operation in (0, 9) for flags in (0, 128, 256, 384)}
_MOST_POLLED = 4096

_Field = tuple[int, int, int | bytes]
_End = tuple[bytes, int]


def tty_external(device: int) -> str:
    """Return the key of /dev/tty on the file system `device` (its st_dev) for CRIU's option `external`."""
    return f"tty[{_TTY:x}:{device:x}]"


def join_terminals(images: int) -> None:
    """Make all descriptors of an outside terminal share one open file; `images` is a descriptor of the directory.

    Raises CriuError when a process has /dev/tty open, but no process has the terminal that it stands for.
    """
    try:
        infos = {_value(info, _INFO_ID): info for info in map(_fields, _entries(_read(images, _INFO)))}
    except FileNotFoundError:
        return
    data = _read(images, _FILES)
    files = [(entry, fields := _fields(entry), _fields(_value_bytes(fields, _FILE_TTY))) for entry in _entries(data)]
    # The id of a slave's information is twice its number, that of its master's one more.
    slaves = {number: _value(info, _INFO_SID) for number, info in infos.items()
              if _value(info, _INFO_TYPE) == _PTY and number % 2 == 0}  # fmt: skip
    chosen: dict[int, int] = {}
    for _, fields, tty in sorted(files, key=lambda file: _value(file[2], _TTY_FLAGS) & os.O_ACCMODE != os.O_RDWR):
        if tty and _value(tty, _TTY_INFO) in slaves:
            chosen.setdefault(_value(tty, _TTY_INFO), _value(fields, _FILE_ID))
    sessions = {session: chosen[number] for number, session in slaves.items() if session and number in chosen}
    instead: dict[int, int] = {}
    for _, fields, tty in files:
        if not tty:
            continue
        info = infos[_value(tty, _TTY_INFO)]
        number, file = _value(info, _INFO_ID), _value(fields, _FILE_ID)
        if (_value(info, _INFO_TYPE), _value(info, _INFO_RDEV)) == (_EXTERNAL, _TTY):
            if _value(info, _INFO_SID) not in sessions:
                raise CriuError(
                    f"a process of session {_value(info, _INFO_SID)} has /dev/tty open, but none has its terminal"
                )
            instead[file] = sessions[_value(info, _INFO_SID)]
        elif number in slaves and number + 1 not in infos and chosen[number] != file:
            instead[file] = chosen[number]
    if not instead:
        return
    for name in os.listdir(images):
        if name.startswith(_DESCRIPTORS):
            table = _read(images, name)
            _write(images, name, table[:8], [_pointed(entry, instead) for entry in _entries(table)])
    _write(images, _FILES, data[:8], [entry for entry, fields, _ in files if _value(fields, _FILE_ID) not in instead])


def keep_external_mounts(images: int) -> None:
    """Clear the mark "deleted" of mounts from outside; `images` is a descriptor of the directory."""
    for name in os.listdir(images):
        if name.startswith(_MOUNTS):
            data = _read(images, name)
            entries = [(entry, _fields(entry)) for entry in _entries(data)]
            kept = [
                _encode([field for field in fields if field[0] != _MOUNT_DELETED])
                if _value_bytes(fields, _MOUNT_KEY) and _value(fields, _MOUNT_DELETED)
                else entry
                for entry, fields in entries
            ]
            if kept != [entry for entry, _ in entries]:
                _write(images, name, data[:8], kept)


def restart_polls(images: int) -> None:
    """Let threads that wait in poll(2) without a timeout call it again; `images` is a descriptor of the directory."""
    for name in os.listdir(images):
        if name.startswith(_CORES):
            data = _read(images, name)
            if _INTERRUPTED in data:
                entries = list(_entries(data))
                restarted = [_replaced(entry, _CORE_X86, _restarted_thread) for entry in entries]
                if restarted != entries:
                    _write(images, name, data[:8], restarted)


def _restarted_thread(info: bytes) -> bytes:
    return _replaced(info, _X86_REGISTERS, _restarted)


def _restarted(registers: bytes) -> bytes:
    """Return registers that call poll again if poll was interrupted, else the same registers."""
    fields = _fields(registers)
    number, count = _value(fields, _ORIG_AX), _value(fields, _SI)
    again = number == _RESTART and 0 < count <= _MOST_POLLED and count not in _FUTEX_WAITS
    is_poll = (number == _POLL or again) and _value(fields, _DX) & 0xFFFFFFFF == 0xFFFFFFFF
    if not is_poll or _value(fields, _AX) != 2**64 - errno.EINTR or _value(fields, _MODE) == _COMPAT:
        return registers
    changed = {_AX: _POLL, _IP: _value(fields, _IP) - _SYSCALL_SIZE}
    return _encode([(number, kind, changed.get(number, value)) for number, kind, value in fields])


def _replaced(message: bytes, number: int, change: Callable[[bytes], bytes]) -> bytes:
    """Return a message with its field `number`, itself a message, changed by `change`."""
    fields = _fields(message)
    return _encode([(n, k, change(v) if n == number and isinstance(v, bytes) else v) for n, k, v in fields])


def dump_id(images: int) -> str:
    """Return CRIU's id of the dump in the directory behind a descriptor; "" before CRIU 4.1."""
    inventory = next(_entries(_read(images, _INVENTORY), 4), b"")  # it has only one magic number
    return _value_bytes(_fields(inventory), _DUMP_ID).decode("ascii", "replace")


def connections(images: int) -> list[tuple[_End, _End]]:
    """Return the local and remote (address, port) of the dumped TCP connections, in network order, each pair once."""
    found: dict[tuple[_End, _End], None] = {}
    for entry in _entries(_read(images, _FILES)):
        sk = _fields(_value_bytes(_fields(entry), _FILE_INET))
        if _value(sk, _SK_PROTOCOL) == socket.IPPROTO_TCP and _value(sk, _SK_STATE) not in (_CLOSE, _LISTEN):
            ends = [
                (_address(sk, number), _value(sk, port)) for number, port in zip(_SK_ADDRESSES, _SK_PORTS, strict=True)
            ]
            found[ends[0], ends[1]] = None
    return list(found)


def address_spaces(images: int) -> list[int]:
    """Return the pids, in the container, of the dumped processes that have memory."""
    names = (name.removeprefix(_MAPPINGS).removesuffix(".img") for name in os.listdir(images)
             if name.startswith(_MAPPINGS))  # fmt: skip
    return sorted(int(name) for name in names if name.isdecimal())


def page_map(images: int, pid: int) -> Iterator[tuple[int, int, int]]:
    """Yield what the dump has of a process's memory: address, number of pages, flags (criu/include/pagemap.h)."""
    entries = _entries(_read(images, f"{_PAGEMAP}{pid}.img"))
    next(entries, None)  # pagemap_head
    for entry in entries:
        found = {number: value for number, _, value in _fields(entry) if isinstance(value, int)}
        pages = found.get(_PAGES) or found.get(_PAGES_COMPAT, 0)
        yield found.get(_PAGES_AT, 0), pages, found.get(_PAGES_FLAGS, 0)


def mappings(images: int, pid: int) -> list[tuple[int, int, int, int]]:
    """Return a process's mappings: start, end, flags (mmap(2)), status (criu/include/image.h)."""
    found = []
    for entry in _entries(_read(images, f"{_MAPPINGS}{pid}.img")):
        for number, _, value in _fields(entry):
            if number == _MM_VMAS and isinstance(value, bytes):
                vma = _fields(value)
                found.append(tuple(_value(vma, field) for field in (_VMA_START, _VMA_END, _VMA_FLAGS, _VMA_STATUS)))
    return [(start, end, flags, status) for start, end, flags, status in found]


def _address(sk: list[_Field], number: int) -> bytes:
    words = [value for n, _, value in sk if n == number and isinstance(value, int)]
    data = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    if _value(sk, _SK_FAMILY) == socket.AF_INET:
        return data[:4]
    return data[12:] if data.startswith(_MAPPED) else data


def _pointed(entry: bytes, instead: dict[int, int]) -> bytes:
    """Return an fdinfo_entry with its file replaced as `instead` says."""
    fields = _fields(entry)
    file = _value(fields, _FD_FILE)
    if file not in instead:
        return entry
    return _encode([(n, kind, instead[file] if n == _FD_FILE else value) for n, kind, value in fields])


def _value(fields: list[_Field], number: int) -> int:
    """Return a number among the fields of a message, 0 without one."""
    return next((value for n, _, value in fields if n == number and isinstance(value, int)), 0)


def _value_bytes(fields: list[_Field], number: int) -> bytes:
    return next((value for n, _, value in fields if n == number and isinstance(value, bytes)), b"")


def _entries(data: bytes, at: int = 8) -> Iterator[bytes]:
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        yield data[at + 4 : at + 4 + size]
        at += 4 + size


def _fields(data: bytes) -> list[_Field]:
    """Return the fields of a message in order: number, wire type, value."""
    found: list[_Field] = []
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            found.append((number, kind, value))
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(kind, 0)
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif not size:
            raise CriuError("an image file of CRIU has an invalid protobuf message")
        found.append((number, kind, data[at : at + size]))
        at += size
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise CriuError("an image file of CRIU is truncated")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _encode(fields: list[_Field]) -> bytes:
    out = bytearray()
    for number, kind, value in fields:
        out += _number(number << 3 | kind)
        if isinstance(value, int):
            out += _number(value)
        else:
            out += (_number(len(value)) if kind == _BYTES else b"") + value
    return bytes(out)


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read(directory: int, name: str) -> bytes:
    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory), "rb") as file:
        return file.read()


def _write(directory: int, name: str, head: bytes, entries: list[bytes]) -> None:
    new = f"{name}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(new, flags, 0o600, dir_fd=directory), "wb") as file:
        file.write(head + b"".join(len(entry).to_bytes(4, "little") + entry for entry in entries))
    os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
