"""Limits of processor time in files as both versions of cgroups have them."""

from pathlib import Path

import pytest

from runtime.cgroups.quota import Quota, used
from runtime.errors import ContainerError


def v1(directory: Path, quota: str = "-1") -> dict[str, str]:
    for name, text in (("cpu.cfs_quota_us", quota), ("cpu.cfs_period_us", "50000"), ("cpuacct.usage", "2500000000")):
        (directory / name).write_text(text + "\n")
    return {"cpu": str(directory), "cpuacct": str(directory), "": "/elsewhere"}


def v2(directory: Path, limit: str = "max 100000") -> dict[str, str]:
    (directory / "cpu.max").write_text(limit + "\n")
    (directory / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 5\n")
    return {"": str(directory)}


def test_both_versions_say_the_limit_and_the_use(tmp_path: Path) -> None:
    assert Quota.of(v1(tmp_path)).processors is None
    assert Quota.of(v1(tmp_path, "25000")).processors == 0.5
    assert Quota.of(v2(tmp_path)).processors is None
    assert Quota.of(v2(tmp_path, "250000 100000")).processors == 2.5
    assert used(v1(tmp_path)) == used(v2(tmp_path)) == 2.5


@pytest.mark.parametrize(("own", "name"), [("-1", "cpu.cfs_quota_us"), ("30000", "cpu.cfs_quota_us")])
def test_a_limit_of_version_1_comes_back(tmp_path: Path, own: str, name: str) -> None:
    quota = Quota.of(v1(tmp_path, own))
    quota.set(0.25)
    assert (tmp_path / name).read_text().startswith("12500")
    (tmp_path / name).write_text("")
    quota.restore()
    assert (tmp_path / name).read_text() == own


def test_a_limit_of_version_2_comes_back_with_its_period(tmp_path: Path) -> None:
    quota = Quota.of(v2(tmp_path, "max 20000"))
    (tmp_path / "cpu.max").write_text("")
    quota.set(0.5)
    assert (tmp_path / "cpu.max").read_text() == "10000"
    (tmp_path / "cpu.max").write_text("")
    quota.restore()
    assert (tmp_path / "cpu.max").read_text() == "max 20000"


def test_there_is_a_smallest_quota(tmp_path: Path) -> None:
    quota = Quota.of(v2(tmp_path))
    (tmp_path / "cpu.max").write_text("")
    quota.set(0.0)
    assert (tmp_path / "cpu.max").read_text() == "1000"


def test_what_cannot_be_limited_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="does not have a cpu cgroup"):
        Quota.of({"pids": "/x", "": "/y"})
    with pytest.raises(ContainerError, match=r"cpu\.max: cannot be read"):
        Quota.of({"": str(tmp_path)})
    with pytest.raises(ContainerError, match="processor time of the container cannot be read"):
        used({"": str(tmp_path)})
    quota = Quota.of(v2(tmp_path))
    (tmp_path / "cpu.max").unlink()
    with pytest.raises(ContainerError, match=r"cpu\.max: cannot be written"):
        quota.set(1.0)
    quota.restore()  # its cgroup is gone, and with it the limit
