"""Modules of the zip file that we run from, as an earlier start has compiled them: that is most of what a start costs.

zipimport keeps nothing. They lie beside the zip file, which is named by its digest, and are root's alone, as it is.
"""

from __future__ import annotations

import marshal
import os
import sys
import zipimport
from _frozen_importlib_external import MAGIC_NUMBER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType


class _Importer(zipimport.zipimporter):
    def get_filename(self, fullname: str) -> str:  # the original compiles a module to tell
        name = self.prefix + fullname.rpartition(".")[2]
        return f"{self.archive}/{name}{'/__init__' if self.is_package(fullname) else ''}.py"

    def get_code(self, fullname: str) -> CodeType:
        path = f"{_directory(self.archive)}/{fullname}"
        try:
            with open(path, "rb") as file:
                found: CodeType = marshal.load(file)
            return found
        except (OSError, EOFError, ValueError, TypeError):
            code = super().get_code(fullname)
        _keep(path, code)
        return code


def _directory(archive: str) -> str:
    """For the modules of a zip file, and for this very interpreter's kind of code."""
    return f"{os.path.realpath(archive).removesuffix('.pyz')}.{MAGIC_NUMBER[:2].hex()}"


def _keep(path: str, code: CodeType) -> None:
    new = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            marshal.dump(code, file)
        os.rename(new, path)
    except OSError:  # no room: the next start compiles it again
        try:
            os.unlink(new)
        except OSError:
            return


def use() -> None:
    """From here on, modules of zip files are taken from there."""
    sys.path_hooks[:] = [_Importer if hook is zipimport.zipimporter else hook for hook in sys.path_hooks]
    sys.path_importer_cache.clear()
