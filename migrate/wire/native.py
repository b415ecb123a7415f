"""Load an optional shared library, and lend it the memory of a Python buffer without a copy.

A call through ctypes releases the interpreter's lock, so that other threads run meanwhile.
"""

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from typing import Any

Buffer = bytes | bytearray | memoryview


class _View(ctypes.Structure):
    """Py_buffer of Python's C API. It has been the same since 3.0."""

    _fields_ = (
        ("buf", ctypes.c_void_p), ("obj", ctypes.py_object), ("len", ctypes.c_ssize_t), ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int), ("ndim", ctypes.c_int), ("format", ctypes.c_char_p), ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("suboffsets", ctypes.c_void_p), ("internal", ctypes.c_void_p),
    )  # fmt: skip


_get_buffer, _release_buffer = ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_View), ctypes.c_int)
_release_buffer.argtypes = (ctypes.POINTER(_View),)
_release_buffer.restype = None
_SIMPLE, _WRITABLE = 0, 1


@contextlib.contextmanager
def address(buffer: Buffer, *, writable: bool = False) -> Iterator[int]:
    """Yield where the bytes of a contiguous buffer are, and keep them there meanwhile. Raises BufferError."""
    view = _View()
    _get_buffer(buffer, ctypes.byref(view), _WRITABLE if writable else _SIMPLE)
    try:
        yield view.buf or 0
    finally:
        _release_buffer(ctypes.byref(view))


Prototypes = Mapping[str, tuple[Any, tuple[Any, ...]]]  # name: result, arguments


def load(name: str, prototypes: Prototypes) -> Any:
    """Return the library `name` with its functions declared; None if it is missing or lacks one of them."""
    try:
        library = ctypes.CDLL(name)
        for function_name, (result, arguments) in prototypes.items():
            function = getattr(library, function_name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return library
