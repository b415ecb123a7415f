"""Call libseccomp.so.2 with ctypes: only the functions that build and export a filter (seccomp_init(3)).

The library compiles the filter but never loads it; init gets a finished program and does not need the library. A
failed call raises OSError with the library's errno; the caller adds the field of config.json.
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
            f"config.json: linux.seccomp: the library libseccomp.so.2 is missing: {error}",
            remedy="apt-get install libseccomp2",
        ) from None
    except AttributeError as error:
        raise NotSupported(
            f"config.json: linux.seccomp: libseccomp.so.2 is older than 2.4: {error}",
            remedy="upgrade libseccomp2",
        ) from None
    return library


def _check(result: int, what: str) -> None:
    """Raise OSError if a library call has returned a negative errno."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")


def version() -> str:
    """Return the library's version, such as "2.5.4"."""
    found = _library().seccomp_version().contents
    return f"{found.major}.{found.minor}.{found.micro}"


def api_level() -> int:
    """Return what library and kernel support (seccomp_api_get(3)): 3 for LOG and KILL_PROCESS, 5 for NOTIFY."""
    return int(_library().seccomp_api_get())


def native_architecture() -> int:
    return int(_library().seccomp_arch_native())


def architecture(name: str) -> int:
    """Return the token of an architecture by the library's name for it, such as "x86_64"; 0 if it is unknown."""
    return int(_library().seccomp_arch_resolve_name(name.encode()))


def syscall_number(architecture: int, name: str) -> int | None:
    """Return a system call's number, negative if only other architectures have the call, None if it is unknown."""
    number = int(_library().seccomp_syscall_resolve_name_arch(architecture, name.encode()))
    return None if number == _UNKNOWN_SYSCALL else number


class Filter:
    """A filter for the native architecture while it is built; a context manager, because the library owns memory."""

    def __init__(self, default_action: int) -> None:
        self._context = _library().seccomp_init(default_action)
        if not self._context:
            raise OSError(0, f"seccomp_init {default_action:#x} failed")

    def __enter__(self) -> Filter:
        return self

    def __exit__(self, *_: object) -> None:
        _library().seccomp_release(self._context)

    def add_architecture(self, token: int) -> None:
        """Apply later rules to this architecture too. EDOM: its byte order differs from those already included."""
        if _library().seccomp_arch_exist(self._context, token) != 0:
            _check(_library().seccomp_arch_add(self._context, token), "seccomp_arch_add")

    def add_rule(self, action: int, syscall: int, comparisons: tuple[tuple[int, int, int, int], ...] = ()) -> None:
        """Add a rule; `comparisons` are (argument, operator, datum, second datum) and must all hold.

        EEXIST: the same rule exists with another action. EINVAL: two comparisons of one argument.
        """
        array = (_Comparison * len(comparisons))(*(_Comparison(*each) for each in comparisons))
        _check(
            _library().seccomp_rule_add_array(self._context, action, syscall, len(comparisons), array),
            "seccomp_rule_add_array",
        )

    def search_by_tree(self) -> None:
        """Search the rules with a binary tree of system call numbers instead of one after the other."""
        _check(_library().seccomp_attr_set(self._context, _ATTRIBUTE_OPTIMIZE, _BINARY_TREE), "seccomp_attr_set")

    def export(self) -> bytes:
        """Return the program, an array of struct sock_filter in this machine's byte order."""
        fd = os.memfd_create("seccomp")
        try:
            _check(_library().seccomp_export_bpf(self._context, fd), "seccomp_export_bpf")
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)
