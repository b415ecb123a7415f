"""Every field that the schema of runtime-spec 1.2 has for Linux is read, or refused by its path.

The paths are those of schema/config-schema.json and what it refers to, at tag v1.2.1.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import NotSupported, SpecError
from runtime.spec.config import parse
from runtime.spec.default import default_spec

TESTS = Path(__file__).parents[3]
_ONE_ID = {"containerID": 0, "hostID": 5, "size": 1}
_HOOK = {"path": "/h", "args": ["h"], "env": ["A=b"], "timeout": 3}
_RATE = {"major": 8, "minor": 0, "rate": 100}

# A config.json with every field that this runtime takes.
FULL: dict[str, Any] = {
    "ociVersion": "1.2.0",
    "hooks": {
        point: [_HOOK]
        for point in ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
    },
    "annotations": {"a.b": "c"},
    "hostname": "h",
    "domainname": "d",
    "mounts": [{"source": "/s", "destination": "/d", "options": ["rbind", "ridmap"], "type": "bind",
                "uidMappings": [_ONE_ID], "gidMappings": [_ONE_ID]}],
    "root": {"path": "rootfs", "readonly": True},
    "process": {
        "args": ["sh"],
        "consoleSize": {"height": 24, "width": 80},
        "cwd": "/",
        "env": ["A=b"],
        "terminal": True,
        "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3]},
        "capabilities": {
            name: ["CAP_KILL"] for name in ("bounding", "permitted", "effective", "inheritable", "ambient")
        },
        "apparmorProfile": "p",
        "oomScoreAdj": 1,
        "selinuxLabel": "l",
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4},
        "noNewPrivileges": True,
        "scheduler": {"policy": "SCHED_DEADLINE", "nice": 0, "priority": 0, "flags": ["SCHED_FLAG_RECLAIM"],
                      "runtime": 1, "deadline": 2, "period": 3},
        "rlimits": [{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
        "execCPUAffinity": {"initial": "0", "final": "0-1, 3"},
    },
    "linux": {
        "devices": [{"type": "c", "path": "/dev/x", "fileMode": 438, "major": 1, "minor": 3, "uid": 0, "gid": 0}],
        "uidMappings": [_ONE_ID],
        "gidMappings": [_ONE_ID],
        "namespaces": [{"type": "mount"}, {"type": "user"}, {"type": "time"}, {"type": "network", "path": "/n"}],
        "resources": {
            "unified": {"memory.high": "1000000"},
            "devices": [{"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}],
            "pids": {"limit": 10},
            "blockIO": {
                "weight": 100, "leafWeight": 100,
                "throttleReadBpsDevice": [_RATE], "throttleWriteBpsDevice": [_RATE],
                "throttleReadIOPSDevice": [_RATE], "throttleWriteIOPSDevice": [_RATE],
                "weightDevice": [{"major": 8, "minor": 0, "weight": 100, "leafWeight": 100}],
            },
            "cpu": {"cpus": "0", "mems": "0", "period": 100000, "quota": 50000, "burst": 1000,
                    "realtimePeriod": 1000000, "realtimeRuntime": 1000, "shares": 512, "idle": 0},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            "memory": {"limit": 1 << 26, "reservation": 1 << 25, "swap": 1 << 27, "swappiness": 10,
                       "kernelTCP": 1 << 26, "disableOOMKiller": False, "checkBeforeUpdate": True,
                       "kernel": -1, "useHierarchy": True},
            "network": {"classID": 5, "priorities": [{"name": "lo", "priority": 1}]},
            "rdma": {"mlx5": {"hcaHandles": 1, "hcaObjects": 2}},
        },
        "cgroupsPath": "/x",
        "rootfsPropagation": "rslave",
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "listenerPath": "/agent", "listenerMetadata": "m", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
                 "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ"}]},
                {"names": ["mount"], "action": "SCMP_ACT_NOTIFY"},
            ],
        },
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "maskedPaths": ["/m"],
        "readonlyPaths": ["/r"],
        "mountLabel": "l",
        "personality": {"domain": "LINUX32"},
        "timeOffsets": {name: {"secs": 1, "nanosecs": 2} for name in ("boottime", "monotonic")},
    },
}  # fmt: skip

# A group of fields -> the tests that show what they do on a real kernel.
COVERED = """
ociVersion                      unit/runtime/spec/test_config.py::test_the_field_is_named
hooks hooks.*                   system/spec/test_hooks.py::test_order_place_and_input
annotations                     system/spec/test_hooks.py::test_order_place_and_input
hostname domainname             system/spec/test_namespaces.py::test_names
mounts mounts[].source mounts[].destination mounts[].type
                                system/spec/test_mounts.py::test_files_directories_and_nested_places
mounts[].options                system/spec/test_mounts.py::test_options_of_one_mount_and_of_the_tree
mounts[].uidMappings* mounts[].gidMappings*
                                system/spec/test_users.py::test_mappings_of_a_mount
root root.*                     system/spec/test_mounts.py::test_root
process process.args            system/spec/test_process.py::test_relative_program_is_found_from_cwd
process.consoleSize*            system/spec/test_terminal.py::test_console_socket
process.cwd                     system/spec/test_process.py::test_cwd
process.env                     system/spec/test_process.py::test_environment_is_what_the_bundle_says
process.terminal                system/spec/test_terminal.py::test_run_in_the_foreground
process.user*                   system/spec/test_process.py::test_user_groups_and_umask
process.capabilities*           system/spec/test_process.py::test_capabilities_of_another_user
process.apparmorProfile process.selinuxLabel linux.mountLabel
                                system/spec/test_process.py::test_labels_that_this_kernel_does_not_know_are_refused
process.oomScoreAdj             system/spec/test_process.py::test_oom_score
process.ioPriority*             system/spec/test_process.py::test_io_priority
process.noNewPrivileges         system/spec/test_process.py::test_no_new_privileges
process.scheduler*              system/spec/test_process.py::test_scheduler
process.execCPUAffinity*        system/spec/test_process.py::test_processors_of_exec
process.rlimits*                system/spec/test_process.py::test_rlimits
linux linux.namespaces*         system/spec/test_namespaces.py::test_absent_and_new
linux.devices*                  system/spec/test_targets.py::test_devices
linux.uidMappings* linux.gidMappings*
                                system/spec/test_users.py::test_root_inside_is_another_outside
linux.resources*                system/lifecycle/test_cgroups.py
linux.cgroupsPath               system/lifecycle/test_cgroups.py
linux.rootfsPropagation         system/spec/test_mounts.py::test_root_propagation
linux.seccomp*                  system/spec/test_seccomp.py::test_errno
linux.sysctl                    system/spec/test_namespaces.py::test_sysctl
linux.maskedPaths linux.readonlyPaths
                                system/spec/test_mounts.py::test_masked_and_read_only_paths
linux.personality*              system/spec/test_namespaces.py::test_personality
linux.timeOffsets*              system/spec/test_namespaces.py::test_time_offsets
"""

# What is refused -> a value to refuse.
REFUSED: dict[str, Any] = {
    "process.commandLine": "sh", "process.user.username": "me", "linux.personality.flags": ["X"],
    "linux.intelRdt": {"closID": "x"}, "linux.intelRdt.closID": "x", "linux.intelRdt.l3CacheSchema": "x",
    "linux.intelRdt.memBwSchema": "x", "linux.intelRdt.enableCMT": True, "linux.intelRdt.enableMBM": True,
    "solaris": {"milestone": "x"}, "windows": {"layerFolders": ["x"]}, "vm": {"kernel": {"path": "/k"}},
    "zos": {"namespaces": [{"type": "pid"}]},
}  # fmt: skip


# An object of the schema: its fields.
SCHEMA = """
-: ociVersion hooks annotations hostname domainname mounts root process linux solaris windows vm zos
hooks: prestart createRuntime createContainer startContainer poststart poststop
hooks.prestart[]: path args env timeout
mounts[]: source destination options type uidMappings gidMappings
mounts[].uidMappings[]: containerID hostID size
mounts[].gidMappings[]: containerID hostID size
root: path readonly
process: args commandLine consoleSize cwd env terminal user capabilities apparmorProfile oomScoreAdj selinuxLabel
    ioPriority noNewPrivileges scheduler rlimits execCPUAffinity
process.execCPUAffinity: initial final
process.consoleSize: height width
process.user: uid gid umask additionalGids username
process.capabilities: bounding permitted effective inheritable ambient
process.ioPriority: class priority
process.scheduler: policy nice priority flags runtime deadline period
process.rlimits[]: hard soft type
linux: devices uidMappings gidMappings namespaces resources cgroupsPath rootfsPropagation seccomp sysctl maskedPaths
    readonlyPaths mountLabel intelRdt personality timeOffsets
linux.devices[]: type path fileMode major minor uid gid
linux.uidMappings[]: containerID hostID size
linux.gidMappings[]: containerID hostID size
linux.namespaces[]: type path
linux.resources: unified devices pids blockIO cpu hugepageLimits memory network rdma
linux.resources.devices[]: allow type major minor access
linux.resources.pids: limit
linux.resources.blockIO: weight leafWeight throttleReadBpsDevice throttleWriteBpsDevice throttleReadIOPSDevice
    throttleWriteIOPSDevice weightDevice
linux.resources.blockIO.throttleReadBpsDevice[]: major minor rate
linux.resources.blockIO.throttleWriteBpsDevice[]: major minor rate
linux.resources.blockIO.throttleReadIOPSDevice[]: major minor rate
linux.resources.blockIO.throttleWriteIOPSDevice[]: major minor rate
linux.resources.blockIO.weightDevice[]: major minor weight leafWeight
linux.resources.cpu: cpus mems period quota burst realtimePeriod realtimeRuntime shares idle
linux.resources.hugepageLimits[]: pageSize limit
linux.resources.memory: kernel kernelTCP limit reservation swap swappiness disableOOMKiller useHierarchy
    checkBeforeUpdate
linux.resources.network: classID priorities
linux.resources.network.priorities[]: name priority
linux.resources.rdma.*: hcaHandles hcaObjects
linux.seccomp: defaultAction defaultErrnoRet flags listenerPath listenerMetadata architectures syscalls
linux.seccomp.syscalls[]: names action errnoRet args
linux.seccomp.syscalls[].args[]: index value valueTwo op
linux.intelRdt: closID l3CacheSchema memBwSchema enableCMT enableMBM
linux.personality: domain flags
linux.timeOffsets: boottime monotonic
linux.timeOffsets.boottime: secs nanosecs
linux.timeOffsets.monotonic: secs nanosecs
"""


def schema() -> list[str]:
    """All paths; those of the six hook points, which are alike, made of those of one."""
    found = []
    for line in SCHEMA.strip().replace("\n    ", " ").splitlines():
        parent, _, names = line.partition(": ")
        found += [f"{parent}.{name}".removeprefix("-.") for name in names.split()]
    points = [path for path in found if path.startswith("hooks.") and path.count(".") == 1]
    hook = [path.rpartition(".")[2] for path in found if path.startswith("hooks.prestart[].")]
    found = [path for path in found if not path.startswith("hooks.prestart[].")]
    return found + [f"{point}[].{name}" for point in points for name in hook]


PATHS = schema()
ACCEPTED = [path for path in PATHS if path not in REFUSED]


def walk(config: dict[str, Any], path: str) -> tuple[Any, Any, str]:
    """The object or array that holds a path's value, the value's key there, and the path as our errors name it."""
    target: Any = config
    said: list[str] = []
    steps = path.replace("[]", ".[]").split(".")
    for number, step in enumerate(steps):
        key: Any = step
        if step == "[]":
            # The element that has what is asked for: not all of them have every field.
            rest = steps[number + 1]
            key = next(index for index, item in enumerate(target) if rest in item)
            said[-1] += f"[{key}]"
        else:
            key = next(iter(target)) if step == "*" else step
            said.append(key)
        if number == len(steps) - 1:
            return target, key, ".".join(said)
        target = target[key]
    raise AssertionError(path)


def complaint(config: dict[str, Any]) -> str:
    try:
        parse(config, "/bundle")
    except SpecError as error:
        return str(error)
    return ""


def test_the_whole_is_accepted() -> None:
    assert complaint(FULL) == ""
    assert len(PATHS) == 221
    assert set(REFUSED) <= set(PATHS)


@pytest.mark.parametrize("path", ACCEPTED)
def test_what_is_accepted_is_read(path: str) -> None:
    """With a value of a type that it cannot have it is refused by its path: nothing of it is ignored."""
    for wrong in (["wrong"], {"wrong": "wrong"}, 0.5):
        config = json.loads(json.dumps(FULL))  # without parts that are one object
        target, key, place = walk(config, path)
        if isinstance(target[key], list | dict) and isinstance(wrong, type(target[key])):
            continue
        target[key] = wrong
        said = complaint(config)
        assert said.startswith(f"config.json: {place}"), (wrong, said)
        assert said[len(f"config.json: {place}")] in ":.[", said


@pytest.mark.parametrize("path", REFUSED)
def test_what_is_refused_is_named(path: str) -> None:
    config = default_spec()
    *parents, last = path.split(".")
    target: Any = config
    for name in parents:
        target = target.setdefault(name, {"domain": "LINUX"} if name == "personality" else {})
    target[last] = REFUSED[path]
    with pytest.raises(NotSupported) as caught:
        parse(config, "/bundle")
    top = "linux.intelRdt" if path.startswith("linux.intelRdt") else path
    assert str(caught.value).startswith(f"config.json: {top}: is not supported")


@pytest.mark.parametrize("path", ACCEPTED)
def test_some_test_shows_what_it_does(path: str) -> None:
    for line in COVERED.strip().replace("\n      ", " ").splitlines():
        *patterns, test = line.split()
        if any(path == pattern or (pattern[-1] == "*" and path.startswith(pattern[:-1])) for pattern in patterns):
            file, _, name = test.partition("::")
            assert f"def {name}" in (TESTS / file).read_text()
            return
    raise AssertionError(f"{path}: nothing shows it")
