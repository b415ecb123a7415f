"""Modules of the zip file that we run from, as an earlier start has compiled them: that is most of what a start costs.

zipimport keeps nothing. They are kept beside a zip file that is named by its digest, as the first stage of a move names
it (wire/peer.py), and only where no other user can put anything: whoever can write there could run code as root.
"""

from __future__ import annotations

import marshal
import os
import sys
import zipimport
from _frozen_importlib_external import MAGIC_NUMBER

from runtime.linux import trusted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType


class _Importer(zipimport.zipimporter):
    def get_filename(self, fullname: str) -> str:  # the original compiles a module to tell
        name = self.prefix + fullname.rpartition(".")[2]
        return f"{self.archive}/{name}{'/__init__' if self.is_package(fullname) else ''}.py"

    def get_code(self, fullname: str) -> CodeType:
        directory = _directory(self.archive)
        try:
            if directory is None:
                return super().get_code(fullname)
            try:
                with open(trusted.open_file(fullname, directory), "rb") as file:
                    found: CodeType = marshal.load(file)
                return found
            except (OSError, EOFError, ValueError, TypeError):
                code = super().get_code(fullname)
            _keep(directory, fullname, code)
            return code
        finally:
            if directory is not None:
                os.close(directory)


def _directory(archive: str) -> int | None:
    """A descriptor of the directory for a zip file's modules and this interpreter's kind of code, if it is safe."""
    path = os.path.realpath(archive)
    name = os.path.basename(path).removesuffix(".pyz").rpartition("-")[2]
    if len(name) != 64 or name.strip("0123456789abcdef"):
        return None  # another file can come in its place, which these were not made of
    try:
        os.close(trusted.open_directory(os.path.dirname(path)))
        return trusted.make_directory(f"{path.removesuffix('.pyz')}.{MAGIC_NUMBER[:2].hex()}")
    except OSError:
        return None


def _keep(directory: int, name: str, code: CodeType) -> None:
    new = f"{name}.{os.getpid()}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(new, flags, 0o600, dir_fd=directory), "wb") as file:
            marshal.dump(code, file)
        os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:  # no room: the next start compiles it again
        try:
            os.unlink(new, dir_fd=directory)
        except OSError:
            return


def use() -> None:
    """From here on, modules of zip files are taken from there."""
    sys.path_hooks[:] = [_Importer if hook is zipimport.zipimporter else hook for hook in sys.path_hooks]
    sys.path_importer_cache.clear()
