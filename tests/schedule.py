"""Which tests share a worker of pytest-xdist, and in which order they begin.

A file's tests run one after the other, as they share labs and engines. So do all tests between the virtual machines,
which are made once. Their images are built at the beginning, beside other tests; the machines run at the end: two of
them, emulated, keep two processors busy, and what is slow anyway should not wait for others.
"""

from typing import Any

IMAGES = "tests/vm/test_images.py"
MACHINES = "tests/vm/"
# Those that take longest begin early, so that none of them is left to one worker in the end.
_SLOW = ("services", "carriers", "move", "engines", "trees", "handover")
LONG = tuple(f"tests/system/test_{name}.py" for name in _SLOW)


def turn(node_id: str) -> int:
    """Return a number that is smaller for tests that begin earlier."""
    file = node_id.partition("::")[0]
    if file == IMAGES:
        return 0
    if file.startswith(MACHINES):
        return len(LONG) + 2
    return LONG.index(file) + 1 if file in LONG else len(LONG) + 1


def scheduler(config: Any, log: Any) -> object:
    """Return one that hands out files as they were collected, and all tests between the machines as one file."""
    from xdist.scheduler import LoadScopeScheduling  # late: without workers pytest needs no pytest-xdist

    class Schedule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return MACHINES if file.startswith(MACHINES) and file != IMAGES else file

    config.option.loadscopereorder = False
    return Schedule(config, log)
