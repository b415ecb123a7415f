"""Bundles of config.json and runtime.json: what the specification 0.1 and 0.2 shows becomes a config.json of today."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import NotSupported, SpecError
from runtime.spec.config import parse
from runtime.spec.default import default_spec
from runtime.spec.two_file import is_two_file, merge, translate
from runtime.spec.two_file_split import split
from tests.unit.runtime.spec.test_config import VALUES, places

BUNDLE = Path("/bundle")


def config() -> dict[str, Any]:
    """The examples of v0.2.0's config.md and config-linux.md."""
    return {
        "version": "0.2.0",
        "platform": {"os": "linux", "arch": "amd64"},
        "process": {
            "terminal": False,
            "user": {"uid": 1, "gid": 1, "additionalGids": [5, 6]},
            "env": ["PATH=/bin", "TERM=xterm"],
            "cwd": "/root",
            "args": ["sh"],
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "mrsdalloway",
        "mounts": [
            {"name": "proc", "path": "/proc"},
            {"name": "data", "path": "/data"},
            {"name": "sys", "path": "/sys"},
        ],
        "linux": {"capabilities": ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]},
    }


def runtime() -> dict[str, Any]:
    """The examples of v0.2.0's runtime-config.md and runtime-config-linux.md."""
    return {
        "mounts": {
            "data": {"type": "bind", "source": "/volumes/testing", "options": ["rbind", "rw"]},
            "proc": {"type": "proc", "source": "proc", "options": []},
            "sys": {"type": "sysfs", "source": "sysfs", "options": ["nosuid"]},
            "unused": {"type": "tmpfs", "source": "tmpfs", "options": None},
        },
        "hooks": {
            "prestart": [{"path": "/usr/bin/fix-mounts", "args": ["fix-mounts", "arg1"], "env": ["key1=value1"]}],
            "poststop": [{"path": "/usr/sbin/cleanup.sh"}],
        },
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/var/run/netns/neta"}, {"type": "mount"}],
            "devices": [
                {
                    "path": "/dev/fuse",
                    "type": "c",
                    "major": 10,
                    "minor": 229,
                    "permissions": "rw",
                    "fileMode": 438,
                    "uid": 7,
                },
                {"type": 98, "major": 8, "minor": -1, "permissions": "r"},
            ],
            "cgroupsPath": "/myRuntime/myContainer",
            "resources": {
                "disableOOMKiller": True,
                "oomScoreAdj": 0,
                "memory": {
                    "limit": 1 << 20,
                    "reservation": 0,
                    "swap": -1,
                    "kernel": 0,
                    "kernelTCP": 0,
                    "swappiness": 0,
                },
                "cpu": {"shares": 512, "quota": 0, "cpus": "0-1", "mems": ""},
                "blockIO": {
                    "blkioWeight": 0,
                    "blkioLeafWeight": 300,
                    "blkioWeightDevice": [{"major": 8, "minor": 0, "weight": 500, "leafWeight": 300}],
                    "blkioThrottleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}],
                    "blkioThrottleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 300}],
                },
                "hugepageLimits": [{"pageSize": "2MB", "limit": 9223372036854771712}],
                "network": {"classID": "0x100001", "priorities": [{"name": "eth0", "priority": 500}]},
                "pids": {"limit": 32771},
            },
            "sysctl": {"net.ipv4.ip_forward": "1"},
            "rlimits": [{"type": "RLIMIT_NPROC", "soft": 1024, "hard": 102400}],
            "selinuxProcessLabel": "system_u:system_r:svirt_lxc_net_t:s0:c124,c675",
            "apparmorProfile": "acme_secure_profile",
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86"],
                "syscalls": [
                    {"name": "getcwd", "action": "SCMP_ACT_ERRNO"},
                    {
                        "name": "personality",
                        "action": "SCMP_ACT_TRAP",
                        "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}],
                    },
                ],
            },
            "rootfsPropagation": "slave",
        },
    }


def test_the_specification_s_examples() -> None:
    merged = merge(config(), runtime())
    names = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
    assert merged["ociVersion"] == "1.2.0"
    assert merged["process"] == {
        "terminal": False,
        "user": {"uid": 1, "gid": 1, "additionalGids": [5, 6]},
        "args": ["sh"],
        "env": ["PATH=/bin", "TERM=xterm"],
        "cwd": "/root",
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted", "inheritable"), names),
        "rlimits": [{"type": "RLIMIT_NPROC", "soft": 1024, "hard": 102400}],
        "apparmorProfile": "acme_secure_profile",
        "selinuxLabel": "system_u:system_r:svirt_lxc_net_t:s0:c124,c675",
        "oomScoreAdj": 0,
    }
    assert (merged["root"], merged["hostname"]) == ({"path": "rootfs", "readonly": True}, "mrsdalloway")
    assert merged["mounts"] == [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/data", "type": "bind", "source": "/volumes/testing", "options": ["rbind", "rw"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
    ]
    assert merged["hooks"] == runtime()["hooks"]
    linux = merged["linux"]
    devices = linux["resources"].pop("devices")
    assert devices[0] == {"allow": False, "access": "rwm"}
    assert devices[-2:] == [
        {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"},
        {"allow": True, "type": "b", "major": 8, "minor": -1, "access": "r"},
    ]
    assert linux["devices"] == [
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 7}
    ]
    assert linux["resources"] == {
        "memory": {"limit": 1 << 20, "swap": -1, "swappiness": 0, "disableOOMKiller": True},
        "cpu": {"shares": 512, "cpus": "0-1"},
        "pids": {"limit": 32771},
        "blockIO": {
            "leafWeight": 300,
            "weightDevice": [{"major": 8, "minor": 0, "weight": 500, "leafWeight": 300}],
            "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}],
            "throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 300}],
        },
        "hugepageLimits": [{"pageSize": "2MB", "limit": 9223372036854771712}],
        "network": {"classID": 0x100001, "priorities": [{"name": "eth0", "priority": 500}]},
    }
    assert linux["namespaces"] == [*runtime()["linux"]["namespaces"], {"type": "cgroup"}]
    assert linux["seccomp"]["syscalls"] == [
        {"names": ["getcwd"], "action": "SCMP_ACT_ERRNO"},
        {
            "names": ["personality"],
            "action": "SCMP_ACT_TRAP",
            "args": [{"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
        },
    ]
    assert [linux[name] for name in ("cgroupsPath", "sysctl", "rootfsPropagation")] == [
        "/myRuntime/myContainer", {"net.ipv4.ip_forward": "1"}, "slave",
    ]  # fmt: skip


def test_zero_values_of_0_1_mean_not_set() -> None:
    """What a Go program wrote that had the 0.1 types and set next to nothing."""
    old, host = config(), runtime()
    old |= {"version": "0.1.0", "hostname": ""}
    old["process"] = {"terminal": False, "user": {"uid": 0, "gid": 0, "additionalGids": None}, "args": ["sh"]}
    old["process"] |= {"env": None, "cwd": ""}
    host["hooks"] = {"prestart": None, "poststop": None}
    host["linux"] = {
        "uidMappings": None, "gidMappings": None, "rlimits": None, "sysctl": None, "cgroupsPath": "",
        "namespaces": [{"type": "pid", "path": ""}, {"type": "mount", "path": ""}], "devices": None,
        "apparmorProfile": "", "selinuxProcessLabel": "", "rootfsPropagation": "",
        "seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []},
        "resources": {
            "disableOOMKiller": False, "memory": {"limit": 0, "swappiness": -1}, "cpu": {"shares": 0, "cpus": ""},
            "pids": {"limit": 0}, "hugepageLimits": None, "network": {"classId": "", "priorities": None},
            "blockIO": {"blkioWeight": 0, "blkioWeightDevice": "", "blkioThrottleReadIopsDevice": ""},
        },
    }  # fmt: skip
    merged = merge(old, host)
    assert set(merged) == {"ociVersion", "process", "root", "mounts", "linux"}
    assert set(merged["linux"]) == {"namespaces", "resources", "maskedPaths", "readonlyPaths"}
    assert set(merged["linux"]["resources"]) == {"devices"}
    assert merged["process"]["cwd"] == "/"
    assert parse(merged, BUNDLE).namespaces == {"pid": None, "mount": None, "cgroup": None}


def test_no_capabilities_are_none() -> None:
    old = config()
    del old["linux"]
    assert set(map(tuple, merge(old, runtime())["process"]["capabilities"].values())) == {()}


def test_mappings_ask_for_a_user_namespace() -> None:
    host = runtime()
    host["linux"]["uidMappings"] = [{"hostID": 1000, "containerID": 0, "size": 10}]
    assert {"type": "user"} in merge(config(), host)["linux"]["namespaces"]


@pytest.mark.parametrize(
    ("file", "place", "value", "words"),
    [
        ("config", ("version",), "0.3.0", "config.json: version: must be 0.1.x or 0.2.x"),
        ("config", ("platform", "os"), "plan9", "config.json: platform.os: must be linux"),
        ("config", ("mounts", 0, "name"), "absent", "config.json: mounts[0].name: 'absent' is not one of"),
        ("config", ("mounts", 0, "type"), "proc", "config.json: mounts[0].type: is unknown"),
        ("config", ("annotations",), {"a": "b"}, "config.json: annotations: is unknown"),
        ("config", ("process", "noNewPrivileges"), True, "config.json: process.noNewPrivileges: is unknown"),
        ("config", ("linux", "capabilities"), {"bounding": []}, "config.json: linux.capabilities: must be an array"),
        ("runtime", ("mounts", "proc", "options"), "ro", "runtime.json: mounts.proc.options: must be an array"),
        ("runtime", ("hooks", "createRuntime"), [], "runtime.json: hooks.createRuntime: is unknown"),
        ("runtime", ("hooks", "prestart", 0, "timeout"), 5, "runtime.json: hooks.prestart[0].timeout: is unknown"),
        ("runtime", ("linux", "namespaces", 0, "type"), "cgroup", "runtime.json: linux.namespaces[0].type"),
        ("runtime", ("linux", "maskedPaths"), [], "runtime.json: linux.maskedPaths: is unknown"),
        ("runtime", ("linux", "devices", 1, "type"), 120, "runtime.json: linux.devices[1].type: must be c, b, u or p"),
        ("runtime", ("linux", "devices", 0, "minor"), -1, "runtime.json: linux.devices[0].minor: must be a number"),
        ("runtime", ("linux", "resources", "unified"), {}, "runtime.json: linux.resources.unified: is unknown"),
        ("runtime", ("linux", "resources", "network", "classID"), "eth0", "linux.resources.network.classID: must be"),
        ("runtime", ("linux", "resources", "blockIO", "blkioWeightDevice"), "8:0 5", "blockIO.blkioWeightDevice: must"),
        ("runtime", ("linux", "resources", "memory", "limit"), "1", "runtime.json: linux.resources.memory.limit: must"),
        ("runtime", ("linux", "seccomp", "syscalls", 0, "names"), ["x"], "linux.seccomp.syscalls[0].names: is unknown"),
        ("runtime", ("linux", "rlimits", 0, "soft"), -1, "runtime.json: linux.rlimits[0].soft: must be a number"),
    ],
)
def test_the_file_and_the_field_are_named(file: str, place: tuple[Any, ...], value: Any, words: str) -> None:
    files = {"config": config(), "runtime": runtime()}
    target: Any = files[file]
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(SpecError) as caught:
        merge(**files)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("process.capabilities.effective[2]", "config.json: linux.capabilities[2]"),
        ("process.rlimits[0].soft", "runtime.json: linux.rlimits[0].soft"),
        ("process.env[0]", "config.json: process.env[0]"),
        ("mounts[1].destination", "config.json: mounts[1].path"),
        ("mounts[1].options[0]", "runtime.json: mounts.data.options[0]"),
        ("linux.devices[0].fileMode", "runtime.json: linux.devices[0].fileMode"),
        ("linux.resources.devices[11].access", "runtime.json: linux.devices[0].permissions"),
        ("linux.resources.devices[12]", "runtime.json: linux.devices[1]"),
        ("linux.resources.blockIO.weightDevice[0].weight", "linux.resources.blockIO.blkioWeightDevice[0].weight"),
        ("linux.resources.memory.limit", "runtime.json: linux.resources.memory.limit"),
        ("linux.resources.memory.disableOOMKiller", "runtime.json: linux.resources.disableOOMKiller"),
        ("process.apparmorProfile", "runtime.json: linux.apparmorProfile"),
        ("hooks.prestart[0].path", "runtime.json: hooks.prestart[0].path"),
        ("hostname", "config.json: hostname"),
    ],
)
def test_later_complaints_go_back_to_the_two_files(said: str, words: str) -> None:
    assert f"{words}: is bad: very" in translate(f"config.json: {said}: is bad: very", config(), runtime())


def test_translate_leaves_other_messages_alone() -> None:
    assert translate("the container's init ended", config(), runtime()) == "the container's init ended"


HOST_PLACES = [("config", place) for place in places(config())] + [("runtime", place) for place in places(runtime())]


@settings(max_examples=400, deadline=None)
@given(place=st.sampled_from(HOST_PLACES), value=VALUES)
def test_any_mutation_is_a_spec_or_one_clear_error(place: tuple[str, tuple[Any, ...]], value: Any) -> None:
    files = copy.deepcopy({"config": config(), "runtime": runtime()})
    target: Any = files[place[0]]
    for key in place[1][:-1]:
        target = target[key]
    target[place[1][-1]] = value
    said = ""
    try:
        merged = merge(**files)
    except SpecError as error:
        said = str(error)
        assert said.startswith(f"{place[0]}.json: ") or "is not one of the mounts in runtime.json" in said
    else:
        try:
            parse(merged, BUNDLE)
        except SpecError as error:
            said = translate(str(error), **files)
    assert not said or (said.startswith(("config.json: ", "runtime.json: ")) and "\n" not in said)


def test_the_default_survives_being_split() -> None:
    """All but what the layout cannot say: noNewPrivileges, and the inheritable set."""
    expected = default_spec()
    expected["process"]["capabilities"]["inheritable"] = expected["process"]["capabilities"]["bounding"]
    del expected["process"]["noNewPrivileges"]
    assert merge(*split(default_spec())) == expected


def test_what_was_merged_survives_being_split() -> None:
    merged = merge(config(), runtime())
    assert merge(*split(merged)) == merged


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("domainname",), "example"),
        (("annotations",), {"a": "b"}),
        (("process", "user", "umask"), 0o22),
        (("process", "capabilities", "ambient"), ["CAP_KILL"]),
        (("process", "capabilities", "effective"), []),
        (("process", "capabilities"), None),
        (("hooks",), {"createRuntime": [{"path": "/x"}]}),
        (("hooks",), {"prestart": [{"path": "/x", "timeout": 1}]}),
        (("linux", "maskedPaths"), []),
        (("linux", "namespaces"), [{"type": "pid"}, {"type": "mount"}]),
        (("linux", "resources", "unified"), {"memory.high": "1"}),
        (("linux", "resources", "devices"), [{"allow": True, "access": "rwm"}]),
        (("linux", "devices"), [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]),
        (("linux", "seccomp"), {"defaultAction": "SCMP_ACT_LOG", "flags": ["SECCOMP_FILTER_FLAG_LOG"]}),
    ],
)
def test_split_refuses_what_it_cannot_say(place: tuple[Any, ...], value: Any) -> None:
    spec = default_spec()
    target: Any = spec
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(NotSupported, match=r"^config\.json: ") as caught:
        split(spec)
    assert str(place[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("config_text", "with_runtime", "answer"),
    [
        ('{"version": "0.1.0"}', True, True),
        ('{"version": "0.1.0"}', False, False),
        ('{"ociVersion": "1.0.0", "version": "0.1.0"}', True, False),
        ('{"version": "1.0.0"}', True, False),
        ("[]", True, False),
        ("{", True, False),
        ("[" * 100000, True, False),
    ],
)
def test_which_bundles_are_of_two_files(tmp_path: Path, config_text: str, with_runtime: bool, answer: bool) -> None:
    (tmp_path / "config.json").write_text(config_text)
    if with_runtime:
        (tmp_path / "runtime.json").write_text("{}")
    assert is_two_file(tmp_path) is answer
    assert not is_two_file(tmp_path / "absent")


def test_the_files_are_json() -> None:
    assert json.loads(json.dumps(split(default_spec()))) == list(split(default_spec()))
