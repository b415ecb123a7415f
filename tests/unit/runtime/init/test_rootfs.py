"""Making what is missing in a root file system (runtime/init/rootfs.py)."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from runtime.init.rootfs import Root

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("kind", ["make_directory", "make_file"])
def test_two_containers_may_make_the_same_at_once(tmp_path: Path, kind: str) -> None:
    together = Barrier(2)

    def make(path: str) -> None:
        root = Root(str(tmp_path))
        together.wait(10)
        try:
            os.close(getattr(root, kind)(path))
        finally:
            root.close()

    with ThreadPoolExecutor(2) as pool:
        for number in range(200):
            path = f"/{number}/a/b/c/d"
            list(pool.map(make, [path, path]))
            assert (tmp_path / path.lstrip("/")).exists()
