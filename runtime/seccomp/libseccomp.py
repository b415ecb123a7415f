"""libseccomp.so.2 by ctypes, seccomp_init(3) and its relatives: only what builds a filter and exports it.

The library compiles; it never loads: init gets a finished program and needs no library. Failures of single calls are
OSError with the library's errno, for the caller to say which field of config.json they are about.
"""

from __future__ import annotations

import ctypes
import functools
import os

from runtime.errors import NotSupported

_ATTRIBUTE_OPTIMIZE = 8
_BINARY_TREE = 2
_UNKNOWN_SYSCALL = -1  # __NR_SCMP_ERROR


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp"""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))


# name: result, arguments
_PROTOTYPES = {
    "seccomp_version": (ctypes.POINTER(_Version), ()),
    "seccomp_api_get": (ctypes.c_uint, ()),
    "seccomp_arch_native": (ctypes.c_uint32, ()),
    "seccomp_arch_resolve_name": (ctypes.c_uint32, (ctypes.c_char_p,)),
    "seccomp_syscall_resolve_name_arch": (ctypes.c_int, (ctypes.c_uint32, ctypes.c_char_p)),
    "seccomp_init": (ctypes.c_void_p, (ctypes.c_uint32,)),
    "seccomp_release": (None, (ctypes.c_void_p,)),
    "seccomp_arch_exist": (ctypes.c_int, (ctypes.c_void_p, ctypes.c_uint32)),
    "seccomp_arch_add": (ctypes.c_int, (ctypes.c_void_p, ctypes.c_uint32)),
    "seccomp_attr_set": (ctypes.c_int, (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32)),
    "seccomp_rule_add_array": (
        ctypes.c_int,
        (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Comparison)),
    ),
    "seccomp_export_bpf": (ctypes.c_int, (ctypes.c_void_p, ctypes.c_int)),
}


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except OSError as error:
        raise NotSupported(
            f"config.json: linux.seccomp: needs the library libseccomp.so.2: {error}",
            remedy="apt-get install libseccomp2",
        ) from None
    except AttributeError as error:
        raise NotSupported(
            f"config.json: linux.seccomp: libseccomp.so.2 is too old, 2.4 at least is needed: {error}",
            remedy="upgrade libseccomp2",
        ) from None
    return library


def _check(result: int, what: str) -> None:
    """The library returns 0 or a negative errno."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")


def version() -> str:
    """Such as "2.5.4"."""
    found = _library().seccomp_version().contents
    return f"{found.major}.{found.minor}.{found.micro}"


def api_level() -> int:
    """seccomp_api_get(3): what library and kernel can do together, 3 for LOG and KILL_PROCESS, 5 for NOTIFY."""
    return int(_library().seccomp_api_get())


def native_architecture() -> int:
    return int(_library().seccomp_arch_native())


def architecture(name: str) -> int:
    """The token of an architecture by the library's own name, such as "x86_64"; 0 when it knows none."""
    return int(_library().seccomp_arch_resolve_name(name.encode()))


def syscall_number(architecture: int, name: str) -> int | None:
    """The number; negative when other architectures have this call; None when the library does not know the name."""
    number = int(_library().seccomp_syscall_resolve_name_arch(architecture, name.encode()))
    return None if number == _UNKNOWN_SYSCALL else number


class Filter:
    """A filter for the native architecture while it is built; a context manager, since it is memory of the library."""

    def __init__(self, default_action: int) -> None:
        self._context = _library().seccomp_init(default_action)
        if not self._context:
            raise OSError(0, f"seccomp_init {default_action:#x} failed")

    def __enter__(self) -> Filter:
        return self

    def __exit__(self, *_: object) -> None:
        _library().seccomp_release(self._context)

    def add_architecture(self, token: int) -> None:
        """Rules added from now on are for this one as well. EDOM: of another byte order than those already in."""
        if _library().seccomp_arch_exist(self._context, token) != 0:
            _check(_library().seccomp_arch_add(self._context, token), "seccomp_arch_add")

    def add_rule(self, action: int, syscall: int, comparisons: tuple[tuple[int, int, int, int], ...] = ()) -> None:
        """`comparisons` are (argument, operator, datum, second datum) and must all hold.

        EEXIST: another action was given for the same before. EINVAL: two comparisons of one argument.
        """
        array = (_Comparison * len(comparisons))(*(_Comparison(*each) for each in comparisons))
        _check(
            _library().seccomp_rule_add_array(self._context, action, syscall, len(comparisons), array),
            "seccomp_rule_add_array",
        )

    def search_by_tree(self) -> None:
        """Find the rule of a system call by a binary tree of numbers, not one after the other."""
        _check(_library().seccomp_attr_set(self._context, _ATTRIBUTE_OPTIMIZE, _BINARY_TREE), "seccomp_attr_set")

    def export(self) -> bytes:
        """The program, an array of struct sock_filter in this machine's byte order."""
        fd = os.memfd_create("seccomp")
        try:
            _check(_library().seccomp_export_bpf(self._context, fd), "seccomp_export_bpf")
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)
