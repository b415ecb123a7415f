"""The features document claims what the parser accepts, no more and no less."""

import json
from pathlib import Path
from typing import Any

import pytest

from migrate import __version__
from migrate.cli import VERBS
from migrate.cli.flags import Values
from migrate.commands import features as verb
from runtime.cgroups.systemd import ANNOTATION as PROPERTY
from runtime.errors import SpecError
from runtime.lifecycle.features import features
from runtime.spec.annotations import NET
from runtime.spec.config import parse
from runtime.spec.default import default_spec
from runtime.spec.mounts import parse_options

BUNDLE = Path("/bundle")
LINUX = features()["linux"]
MAPPING = [{"containerID": 0, "hostID": 1000, "size": 1}]


def accepts(*place: str, value: Any) -> bool:
    """Whether spec.parse takes the default config.json with one field changed."""
    config: Any = default_spec()
    target = config
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    try:
        parse(config, BUNDLE)
    except SpecError:
        return False
    return True


def test_the_claimed_versions_are_taken() -> None:
    document = features()
    assert accepts("ociVersion", value=document["ociVersionMin"])
    assert accepts("ociVersion", value=document["ociVersionMax"])
    assert not accepts("ociVersion", value="0.9.0")


@pytest.mark.parametrize("option", features()["mountOptions"])
def test_each_mount_option_is_none_of_the_file_system_s(option: str) -> None:
    assert parse_options((option,)).data == ""
    mount: dict[str, Any] = {"destination": "/x", "type": "bind", "source": "/y", "options": [option]}
    if option == "tmpcopyup":
        mount["type"] = "tmpfs"
    if option in ("idmap", "ridmap"):
        mount |= {"uidMappings": MAPPING, "gidMappings": MAPPING}
    assert accepts("mounts", value=[mount])


def test_an_option_of_the_file_system_is_not_claimed() -> None:
    assert {"size=1k", "mode=755"}.isdisjoint(features()["mountOptions"])


@pytest.mark.parametrize("point", features()["hooks"])
def test_each_hook_is_parsed(point: str) -> None:
    config = default_spec() | {"hooks": {point: [{"path": "/x"}]}}
    assert parse(config, BUNDLE).hooks[point][0].path == "/x"


def test_exactly_the_claimed_namespaces_are_taken() -> None:
    known = ("cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts")
    base = {"pid", "mount"}
    taken = []
    for kind in (*known, "other"):
        linux = {"namespaces": [{"type": name} for name in sorted(base | {kind})]}
        if kind == "user":
            linux |= {"uidMappings": MAPPING, "gidMappings": MAPPING}
        taken += [kind] if accepts("linux", value=linux) else []
    assert taken == LINUX["namespaces"]


def test_annotations_that_change_something_are_named() -> None:
    unsafe = features()["potentiallyUnsafeConfigAnnotations"]
    for name in (NET, f"{PROPERTY}TimeoutStopUSec"):
        assert any(name == one or (one[-1] == "." and name.startswith(one)) for one in unsafe)


def test_the_claimed_capabilities_are_taken() -> None:
    assert accepts("process", "capabilities", value={"bounding": LINUX["capabilities"]})
    assert {"CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"} <= set(LINUX["capabilities"])


IDMAPPED = {"destination": "/x", "type": "bind", "source": "/y", "uidMappings": MAPPING, "gidMappings": MAPPING}


@pytest.mark.parametrize(
    ("enabled", "place", "value"),
    [
        (LINUX["apparmor"]["enabled"], ("process", "apparmorProfile"), "profile"),
        (LINUX["selinux"]["enabled"], ("process", "selinuxLabel"), "system_u:system_r:container_t:s0"),
        (LINUX["intelRdt"]["enabled"], ("linux", "intelRdt"), {"closID": "x"}),
        (LINUX["mountExtensions"]["idmap"]["enabled"], ("mounts",), [IDMAPPED]),
        (LINUX["cgroup"]["systemd"], ("linux", "cgroupsPath"), "system.slice:pymigrate:web"),
        (LINUX["cgroup"]["rdma"], ("linux", "resources", "rdma"), {"mlx5_1": {"hcaHandles": 1}}),
    ],
)
def test_enabled_is_what_the_parser_takes(enabled: bool, place: tuple[str, ...], value: Any) -> None:
    assert accepts(*place, value=value) is enabled


def test_the_verb_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "features" in VERBS
    assert verb.run(Values(json=False)) == 0
    expected = features()
    expected["annotations"]["org.pymigrate.version"] = __version__
    assert json.loads(capsys.readouterr().out) == expected
