"""config.json: whatever it holds ends in a Spec or in one error that names the field."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import SpecError
from runtime.spec.config import load, parse
from runtime.spec.default import default_spec

BUNDLE = Path("/bundle")
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.text(max_size=8), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2), st.just("a\0b"), st.just("../x"),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


PLACES = places(default_spec())


@settings(max_examples=400, deadline=None)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_mutation_is_a_spec_or_one_clear_error(place: tuple[Any, ...], value: Any) -> None:
    config = copy.deepcopy(default_spec())
    target = config
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    said = ""
    try:
        parse(config, BUNDLE)
    except SpecError as error:
        said = str(error)
    assert not said or (said.startswith("config.json: ") and "\n" not in said)


def test_the_default_is_movable() -> None:
    spec = parse(default_spec(), BUNDLE)
    assert (spec.readonly, spec.process.terminal, spec.seccomp) == (True, False, None)
    assert spec.root == str(BUNDLE / "rootfs")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("linux", "uidMappings"), [{"containerID": 0, "hostID": 1, "size": 1}], "linux.uidMappings: needs a new user"),
        (("linux", "intelRdt"), {"closID": "x"}, "linux.intelRdt: is not supported"),
        (("linux", "timeOffsets"), {"monotonic": {"secs": 1}}, "linux.timeOffsets: needs a new time namespace"),
        (("linux", "personality"), {"domain": "SUN"}, "linux.personality.domain: must be one of"),
        (("process", "scheduler"), {"policy": "SCHED_FIFO"}, "process.scheduler.priority: must be 1 to 99"),
        (
            ("process", "execCPUAffinity"),
            {"initial": "1-0"},
            "process.execCPUAffinity.initial: '1-0' is not a processor",
        ),
        (("process", "execCPUAffinity"), {"final": "0,,1"}, "process.execCPUAffinity.final: '' is not a processor"),
        (("process", "execCPUAffinity"), {"final": "0-99999"}, "process.execCPUAffinity.final: '0-99999' is no"),
        (("process", "ioPriority"), {"class": "IOPRIO_CLASS_BE", "priority": 8}, "process.ioPriority.priority: must"),
        (("mounts", 0, "options"), ["idmap"], "mounts[0].options: ids can be mapped in a bind mount only"),
        (("mounts", 1, "uidMappings"), [{"hostID": 1, "size": 1}], "mounts[1].gidMappings: is missing"),
        (("linux", "devices"), [{"path": "/dev/x", "type": "c", "major": 2**40}], "linux.devices[0].major: must be"),
        (("hooks",), {"prestart": [{"path": "/x", "timeout": 2**62}]}, "hooks.prestart[0].timeout: must be"),
        (("process", "user", "additionalGids"), [1] * 65537, "process.user.additionalGids: must hold at most"),
        (("process", "args"), ["true", "\ud800"], "process.args[1]: must be a string without null characters and lone"),
        (("annotations",), {"a\nb\x1b[31m": 1}, r"annotations.a\nb\x1b[31m: must be a string"),
        (("ociVersion",), "1.2.0\nx", "ociVersion: must be 1.x.y"),
        (
            ("linux", "resources", "unified"),
            {"cgroup.procs": "1"},
            "linux.resources.unified.cgroup.procs: is not a limit",
        ),
        (("process", "capabilities", "bounding"), ["CAP_MAGIC", 1], "process.capabilities.bounding[1]: must be a"),
        (("mounts", 0, "destination"), "a/../b", "mounts[0].destination: must be an absolute path without .."),
        (("mounts", 0, "destination"), "./", "mounts[0].destination: must be below the root"),
        (("annotations",), {"": "x"}, "annotations: a key must not be empty"),
        (("process", "rlimits"), [{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 4}], "process.rlimits[0].soft: is 5"),
        (("linux", "cgroupsPath"), "../../x", "linux.cgroupsPath"),
        (("linux", "maskedPaths"), ["/proc/../x"], "linux.maskedPaths[0]"),
        (("annotations",), {"a": 1}, "annotations.a: must be a string"),
        (("linux", "resources", "memory"), {"limit": -2}, "linux.resources.memory.limit"),
        (("linux", "namespaces", 4, "path"), "/proc/1/ns/mnt", "joining a mount namespace"),
    ],
)
def test_the_field_is_named(place: tuple[Any, ...], value: Any, words: str) -> None:
    config = default_spec()
    target: Any = config
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(SpecError) as caught:
        parse(config, BUNDLE)
    assert words in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ("\xff", "JSON"), ("[" * 100000, "JSON")])
def test_files_that_are_no_json(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SpecError, match=words):
        load(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file") as caught:
        load(tmp_path)
    assert caught.value.remedy is not None
