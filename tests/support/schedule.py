"""Which tests share a worker of pytest-xdist, and in which order they begin.

A file's tests run one after the other, as they share labs and engines. So do those that run containers on this machine
itself, whose cgroups are named after their ids, and all tests between the virtual machines, which are made once. Their
images are built at the beginning, beside other tests; the machines run at the end: two of them, emulated, keep two
processors busy, and what is slow anyway should not wait for others.
"""

import functools
from pathlib import Path
from typing import Any

from tests.support.draw import MACHINES

IMAGES = "tests/vm/test_images.py"
HERE = "this machine"
# Those that take longest begin early, so that none of them is left to one worker in the end.
_SLOW = ("move/test_services", "move/test_carriers", "move/test_move", "engines/test_engines", "move/test_trees")
LONG = tuple(f"tests/system/{name}.py" for name in (*_SLOW, "move/test_handover"))
_TOP = Path(__file__).resolve().parents[2]


@functools.cache
def share(file: str) -> str:
    """Return a name that all test files have in common whose tests may not run at the same time."""
    if file.startswith(MACHINES) and file != IMAGES:
        return MACHINES
    if file.startswith("tests/system/") and "Local" in (_TOP / file).read_text():
        return HERE  # with the fixture `pymigrate`
    return file


def turn(node_id: str) -> int:
    """Return a number that is smaller for tests that begin earlier."""
    file = node_id.partition("::")[0]
    order = (IMAGES, *LONG, HERE, "", MACHINES)
    name = file if file in order else share(file)
    return order.index(name if name in order else "")


def scheduler(config: Any, log: Any) -> object:
    """Return one that hands out what `share` says in the order in which it was collected."""
    from xdist.scheduler import LoadScopeScheduling  # late: without workers pytest needs no pytest-xdist

    class Schedule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return share(nodeid.partition("::")[0])

    config.option.loadscopereorder = False
    return Schedule(config, log)
