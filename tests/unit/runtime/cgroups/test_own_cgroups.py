"""A state.json says whose processes are killed: what cannot be a container's cgroup is refused before that."""

import pytest

from runtime.cgroups.cgroup import Cgroup
from runtime.cgroups.hierarchies import discover
from runtime.errors import StateError

# Nothing here may call more than require_own: what follows it kills.
MOUNT = discover()[0].mountpoint


@pytest.mark.parametrize(
    "path",
    [MOUNT, f"{MOUNT}/", f"{MOUNT}/.", f"{MOUNT}/x/..", f"{MOUNT}/x/../..", f"{MOUNT}//x", "/", "", "/tmp/x", "x"],
)
def test_what_is_no_containers_cgroup_is_refused(path: str) -> None:
    with pytest.raises(StateError, match="is not the cgroup of a container"):
        Cgroup({"memory": path}).require_own()


def test_one_below_a_mount_point_is_taken() -> None:
    Cgroup({"memory": f"{MOUNT}/pymigrate/no-such"}).require_own()
    Cgroup({}).require_own()
