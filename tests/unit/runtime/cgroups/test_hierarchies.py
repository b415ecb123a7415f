"""Finding cgroup hierarchies in mount tables of other machines than this one."""

from pathlib import Path

import pytest

from runtime.cgroups import freezer
from runtime.cgroups.hierarchies import UNIFIED, Hierarchy, discover

DEBIAN_13 = """\
24 1 254:0 / / rw,noatime shared:1 - ext4 /dev/vda rw
30 24 0:26 / /sys/fs/cgroup rw,nosuid,nodev,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
"""
HYBRID = """\
31 25 0:27 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
33 31 0:29 / /sys/fs/cgroup/systemd rw,nosuid - cgroup cgroup rw,xattr,name=systemd
34 31 0:30 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw,nsdelegate
35 31 0:28 / /mnt/a\\040copy rw,nosuid - cgroup cgroup rw,cpu,cpuacct
"""
ODD_PLACE = r"9 1 0:28 / /srv/my\040cgroups rw - cgroup2 none rw"


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (DEBIAN_13, [("/sys/fs/cgroup", (UNIFIED,))]),
        (
            HYBRID,
            [
                ("/sys/fs/cgroup/cpu,cpuacct", ("cpu", "cpuacct")),
                ("/sys/fs/cgroup/systemd", ("name=systemd",)),
                ("/sys/fs/cgroup/unified", (UNIFIED,)),
            ],
        ),
        (ODD_PLACE, [("/srv/my cgroups", (UNIFIED,))]),
        ("24 1 254:0 / / rw - ext4 /dev/vda rw\n", []),
    ],
)
def test_each_hierarchy_once_where_it_is_mounted(table: str, expected: list[tuple[str, tuple[str, ...]]]) -> None:
    assert discover(table) == [Hierarchy(place, controllers) for place, controllers in expected]


def test_what_is_gone_need_not_be_thawed(tmp_path: Path) -> None:
    """`kill` waits for no lock: a container can be deleted between its look at the freezer and the thaw."""
    freezer.thaw({"freezer": str(tmp_path / "gone")})
    freezer.thaw({"": str(tmp_path / "gone")})
