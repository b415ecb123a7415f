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

(criu/tty.c, criu/mount-v2.c, compel/arch/x86/src/lib/infect.c; images/core-x86.proto, images/fdinfo.proto,
images/tty.proto, images/inventory.proto, images/sk-inet.proto, images/mnt.proto)
"""

import errno
import os
import socket
import sys
from collections.abc import Callable

from criu_rpc import pb
from criu_rpc.errors import CriuError

_FILES, _INFO, _DESCRIPTORS, _MOUNTS = "files.img", "tty-info.img", "fdinfo-", "mountpoints-"
_TTY = 0x500  # the device number of /dev/tty
# Fields of fdinfo_entry, file_entry, tty_file_entry and tty_info_entry.
_FD_FILE = 1
_FILE_ID, _FILE_TTY = 2, 19
_TTY_INFO, _TTY_FLAGS = 2, 3
_INFO_ID, _INFO_TYPE, _INFO_SID, _INFO_RDEV = 1, 2, 6, 8
_PTY, _EXTERNAL = 1, 5
_MOUNT_DELETED, _MOUNT_KEY = 16, 18  # of mnt_entry

# Of inventory_entry, file_entry and inet_sk_entry.
_INVENTORY = "inventory.img"
_LOCK_METHOD, _DUMP_ID = 11, 13
_NO_LOCK = 2  # NETWORK_LOCK_SKIP (criu/include/cr_options.h)
_FILE_INET = 4
_SK_FAMILY, _SK_PROTOCOL, _SK_STATE, _SK_PORTS, _SK_ADDRESSES = 3, 5, 6, (7, 8), (11, 12)
_CLOSE, _LISTEN = 7, 10
_MAPPED = bytes(10) + b"\xff\xff"  # an IPv4 address in an IPv6 socket

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

_End = tuple[bytes, int]


def tty_external(device: int) -> str:
    """Return the key of /dev/tty on the file system `device` (its st_dev) for CRIU's option `external`."""
    return f"tty[{_TTY:x}:{device:x}]"


def join_terminals(images: int) -> None:
    """Make all descriptors of an outside terminal share one open file; `images` is a descriptor of the directory.

    Raises CriuError when a process has /dev/tty open, but no process has the terminal that it stands for.
    """
    try:
        infos = {pb.value(info, _INFO_ID): info for info in map(pb.fields, pb.entries(pb.read(images, _INFO)))}
    except FileNotFoundError:
        return
    data = pb.read(images, _FILES)
    files = [
        (entry, fields := pb.fields(entry), pb.fields(pb.value_bytes(fields, _FILE_TTY))) for entry in pb.entries(data)
    ]
    # The id of a slave's information is twice its number, that of its master's one more.
    slaves = {number: pb.value(info, _INFO_SID) for number, info in infos.items()
              if pb.value(info, _INFO_TYPE) == _PTY and number % 2 == 0}  # fmt: skip
    chosen: dict[int, int] = {}
    for _, fields, tty in sorted(files, key=lambda file: pb.value(file[2], _TTY_FLAGS) & os.O_ACCMODE != os.O_RDWR):
        if tty and pb.value(tty, _TTY_INFO) in slaves:
            chosen.setdefault(pb.value(tty, _TTY_INFO), pb.value(fields, _FILE_ID))
    sessions = {session: chosen[number] for number, session in slaves.items() if session and number in chosen}
    instead: dict[int, int] = {}
    for _, fields, tty in files:
        if not tty:
            continue
        info = infos[pb.value(tty, _TTY_INFO)]
        number, file = pb.value(info, _INFO_ID), pb.value(fields, _FILE_ID)
        if (pb.value(info, _INFO_TYPE), pb.value(info, _INFO_RDEV)) == (_EXTERNAL, _TTY):
            if pb.value(info, _INFO_SID) not in sessions:
                raise CriuError(
                    f"a process of session {pb.value(info, _INFO_SID)} has /dev/tty open, but none has its terminal"
                )
            instead[file] = sessions[pb.value(info, _INFO_SID)]
        elif number in slaves and number + 1 not in infos and chosen[number] != file:
            instead[file] = chosen[number]
    if not instead:
        return
    for name in os.listdir(images):
        if name.startswith(_DESCRIPTORS):
            table = pb.read(images, name)
            pb.write(images, name, table[:8], [_pointed(entry, instead) for entry in pb.entries(table)])
    pb.write(
        images,
        _FILES,
        data[:8],
        [entry for entry, fields, _ in files if pb.value(fields, _FILE_ID) not in instead],
    )


def keep_external_mounts(images: int) -> None:
    """Clear the mark "deleted" of mounts from outside; `images` is a descriptor of the directory."""
    for name in os.listdir(images):
        if name.startswith(_MOUNTS):
            data = pb.read(images, name)
            entries = [(entry, pb.fields(entry)) for entry in pb.entries(data)]
            kept = [
                pb.encode([field for field in fields if field[0] != _MOUNT_DELETED])
                if pb.value_bytes(fields, _MOUNT_KEY) and pb.value(fields, _MOUNT_DELETED)
                else entry
                for entry, fields in entries
            ]
            if kept != [entry for entry, _ in entries]:
                pb.write(images, name, data[:8], kept)


def restart_polls(images: int) -> None:
    """Let threads that wait in poll(2) without a timeout call it again; `images` is a descriptor of the directory."""
    for name in os.listdir(images):
        if name.startswith(_CORES):
            data = pb.read(images, name)
            if _INTERRUPTED in data:
                entries = list(pb.entries(data))
                restarted = [_replaced(entry, _CORE_X86, _restarted_thread) for entry in entries]
                if restarted != entries:
                    pb.write(images, name, data[:8], restarted)


def _restarted_thread(info: bytes) -> bytes:
    return _replaced(info, _X86_REGISTERS, _restarted)


def _restarted(registers: bytes) -> bytes:
    """Return registers that call poll again if poll was interrupted, else the same registers."""
    fields = pb.fields(registers)
    number, count = pb.value(fields, _ORIG_AX), pb.value(fields, _SI)
    again = number == _RESTART and 0 < count <= _MOST_POLLED and count not in _FUTEX_WAITS
    is_poll = (number == _POLL or again) and pb.value(fields, _DX) & 0xFFFFFFFF == 0xFFFFFFFF
    if not is_poll or pb.value(fields, _AX) != 2**64 - errno.EINTR or pb.value(fields, _MODE) == _COMPAT:
        return registers
    changed = {_AX: _POLL, _IP: pb.value(fields, _IP) - _SYSCALL_SIZE}
    return pb.encode([(number, kind, changed.get(number, value)) for number, kind, value in fields])


def _replaced(message: bytes, number: int, change: Callable[[bytes], bytes]) -> bytes:
    """Return a message with its field `number`, itself a message, changed by `change`."""
    fields = pb.fields(message)
    return pb.encode([(n, k, change(v) if n == number and isinstance(v, bytes) else v) for n, k, v in fields])


def forget_lock(images: int) -> None:
    """Have a restore not remove the lock of the network, because it is into a new network, which has none.

    CRIU would load nftables to find that out, while the restored processes wait (12 ms). Do nothing before CRIU 4.1:
    3.17 does not know a network without a lock.
    """
    data = pb.read(images, _INVENTORY)
    entries = [(entry, pb.fields(entry)) for entry in pb.entries(data, 4)]
    if any(pb.value_bytes(fields, _DUMP_ID) for _, fields in entries):
        unlocked = [
            pb.encode([(n, kind, _NO_LOCK if n == _LOCK_METHOD else value) for n, kind, value in fields])
            for _, fields in entries
        ]
        pb.write(images, _INVENTORY, data[:4], unlocked)


def dump_id(images: int) -> str:
    """Return CRIU's id of the dump in the directory behind a descriptor; "" before CRIU 4.1."""
    inventory = next(pb.entries(pb.read(images, _INVENTORY), 4), b"")  # it has only one magic number
    return pb.value_bytes(pb.fields(inventory), _DUMP_ID).decode("ascii", "replace")


def connections(images: int) -> list[tuple[_End, _End]]:
    """Return the local and remote (address, port) of the dumped TCP connections, in network order, each pair once."""
    found: dict[tuple[_End, _End], None] = {}
    for entry in pb.entries(pb.read(images, _FILES)):
        sk = pb.fields(pb.value_bytes(pb.fields(entry), _FILE_INET))
        if pb.value(sk, _SK_PROTOCOL) == socket.IPPROTO_TCP and pb.value(sk, _SK_STATE) not in (
            _CLOSE,
            _LISTEN,
        ):
            ends = [
                (_address(sk, number), pb.value(sk, port))
                for number, port in zip(_SK_ADDRESSES, _SK_PORTS, strict=True)
            ]
            found[ends[0], ends[1]] = None
    return list(found)


def _address(sk: list[pb.Field], number: int) -> bytes:
    words = [value for n, _, value in sk if n == number and isinstance(value, int)]
    data = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    if pb.value(sk, _SK_FAMILY) == socket.AF_INET:
        return data[:4]
    return data[12:] if data.startswith(_MAPPED) else data


def _pointed(entry: bytes, instead: dict[int, int]) -> bytes:
    """Return an fdinfo_entry with its file replaced as `instead` says."""
    fields = pb.fields(entry)
    file = pb.value(fields, _FD_FILE)
    if file not in instead:
        return entry
    return pb.encode([(n, kind, instead[file] if n == _FD_FILE else value) for n, kind, value in fields])
