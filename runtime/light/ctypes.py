"""Give the C part of `ctypes` and the few types that system calls need.

It leaves out the byte orders, callbacks and `struct` of the full module, which cost every container 2 ms.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import (
        Structure,
        addressof,
        byref,
        c_char,
        c_char_p,
        c_int,
        c_long,
        c_size_t,
        c_uint32,
        c_uint64,
        c_ulong,
        c_ushort,
        get_errno,
        sizeof,
    )
    from typing import Any

    def libc(name: str) -> Any: ...

else:
    from _ctypes import (
        FUNCFLAG_CDECL,
        FUNCFLAG_USE_ERRNO,
        CFuncPtr,
        Structure,
        _SimpleCData,
        addressof,
        byref,
        dlopen,
        dlsym,
        get_errno,
        sizeof,
    )

    # The letters are those of `struct`.
    class c_char(_SimpleCData):
        _type_ = "c"

    class c_char_p(_SimpleCData):
        _type_ = "z"

    class c_ushort(_SimpleCData):
        _type_ = "H"

    class c_int(_SimpleCData):
        _type_ = "i"

    class c_uint32(_SimpleCData):
        _type_ = "I"

    class c_long(_SimpleCData):
        _type_ = "l"

    class c_ulong(_SimpleCData):
        _type_ = "L"

    class c_uint64(_SimpleCData):
        _type_ = "Q"

    c_size_t = c_ulong  # on everything that Linux runs on

    class _Function(CFuncPtr):
        _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
        _restype_ = c_int

    def libc(name):
        """Return a function of any loaded library, such as libc; it returns an int until its `restype` is set."""
        return _Function(dlsym(dlopen(None, 0), name))


__all__ = [
    "Structure", "addressof", "byref", "c_char", "c_char_p", "c_int", "c_long", "c_size_t", "c_uint32", "c_uint64",
    "c_ulong", "c_ushort", "get_errno", "libc", "sizeof",
]  # fmt: skip
