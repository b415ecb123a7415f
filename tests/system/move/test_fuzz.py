"""Whatever a config.json holds, `run` ends in success or in one clear error, and leaves nothing.

PYMIGRATE_FUZZ_EXAMPLES sets how many are tried (60).
"""

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrate.cli.exit_codes import EXIT_CODES
from runtime.spec.default import default_spec
from runtime.spec.process import RLIMITS
from tests.support.hosts import PYMIGRATE, ROOTFS
from tests.support.leaks import leaks, left

EXAMPLES = int(os.environ.get("PYMIGRATE_FUZZ_EXAMPLES", "60"))
CODES = {code for code, _ in EXIT_CODES.values()}
ID = f"fuzzed-{os.getpid()}"
INVALID = EXIT_CODES["invalid"][0]

Place = tuple[str | int, ...]


def base(*, user: bool = False) -> dict[str, Any]:
    """The default config.json with something in every field that this version takes; with a user namespace or not."""
    config = default_spec()
    config["process"] |= {
        "args": ["true"],
        "oomScoreAdj": 100,
        "scheduler": {"policy": "SCHED_BATCH", "nice": 1, "priority": 0, "flags": [], "runtime": 0},
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4},
        "rlimits": [
            {"type": "RLIMIT_NOFILE", "soft": 512, "hard": 1024},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_STACK", "soft": 1 << 22, "hard": 1 << 23},
        ],
    }
    config["process"]["user"] |= {"additionalGids": [5, 6], "umask": 0o22}
    config["hooks"] = {
        point: [{"path": "/bin/true", "args": ["true", "x"], "env": ["A=b"], "timeout": 5}]
        for point in ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
    }
    config["hooks"]["startContainer"] = [{"path": "/bin/busybox", "args": ["true"]}]
    config["annotations"] = {"org.example": "x"}
    config["linux"] |= {
        "devices": [
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666, "uid": 0, "gid": 0}
        ],
        "sysctl": {"net.ipv4.ip_forward": "1", "kernel.shmmax": "65536"},
        "rootfsPropagation": "rprivate",
        "personality": {"domain": "LINUX"},
        "timeOffsets": {"monotonic": {"secs": 5, "nanosecs": 7}, "boottime": {"secs": 5}},
        "seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {"names": ["mknodat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
                {
                    "names": ["socket"],
                    "action": "SCMP_ACT_ERRNO",
                    "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_EQ"}],
                },
            ],
        },
    }
    config["linux"]["namespaces"].append({"type": "time"})
    config["mounts"] += [
        {"destination": "/mnt/a", "type": "bind", "source": "rootfs/etc", "options": ["rbind", "ro", "nosuid"]},
        {"destination": "/mnt/b", "type": "tmpfs", "source": "tmpfs", "options": ["mode=700", "size=65536", "rslave"]},
    ]
    if user:
        config["linux"]["namespaces"].append({"type": "user"})
        for name in ("uidMappings", "gidMappings"):
            config["linux"][name] = [
                {"containerID": 0, "hostID": 0, "size": 1000},  # its root owns the root file system
                {"containerID": 1000, "hostID": 200000, "size": 5},
            ]
    config["linux"]["resources"] |= {
        "memory": {"limit": 1 << 26, "reservation": 1 << 25, "swap": 1 << 27, "swappiness": 50},
        "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 64},
        "devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 10, "minor": 229}],
    }
    return config


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


NUMBERS = [-(2**63), -2, -1, 0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]
STRINGS = [
    "", " ", ".", "..", "a\0b", "a\nb", "a: b", "\x1b[31m", "é€😀", "\ud800", "x" * 300, "x" * 5000, "../x",
    "/a/../../x", "/proc", "/proc/self/ns/net", "/dev/null", "/tmp/x", "rootfs", "%s%n{0}", "-1", "true", "a", "c",
    "rwm", "user", "time", "bind", "A=b", "=", "0-1", "0-99999", "1,", "CAP_SYS_ADMIN", "CAP_X", "RLIMIT_AS",
    "RLIMIT_X", "RLIMIT_NPROC", "SCHED_FIFO", "SCHED_DEADLINE", "SCHED_OTHER", "IOPRIO_CLASS_RT", "LINUX32",
    "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_NOTIFY", "SCMP_ACT_ERRNO", "SCMP_ARCH_ARM", "SCMP_CMP_MASKED_EQ", "execve",
    "write", "/", "/a/b/c", "shared", "unbindable", "tmpfs", "proc", "sysfs", "mqueue", "cgroup", "overlay", "ext4",
]  # fmt: skip
OPTIONS = [
    "ro", "rw", "bind", "rbind", "remount", "rro", "idmap", "tmpcopyup", "shared", "rslave", "unbindable",
    "nosymfollow", "size=1", "size=x", "mode=", "mode=9", "gid=99999999999", "a,b", "a=b", "x" * 5000, "noexec",
    "nodev", "lazytime",
]  # fmt: skip
NAMES = [
    "x", "", "a.b", "a\nb", "é", "type", "path", "options", "source", "limit", "swap", "kernel", "swappiness",
    "timeout", "uidMappings", "umask", "terminal", "seccomp", "cgroupsPath", "unified", "blockIO", "hugepageLimits",
    "rdma", "intelRdt", "personality", "timeOffsets", "mountLabel", "apparmorProfile", "selinuxLabel", "scheduler",
    "ioPriority", "ambient", "domainname", "vm", "windows", "burst", "idle", "memory.high", "net.core.somaxconn",
    "kernel.hostname", "kernel.panic",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(STRINGS), st.sampled_from([0.5, 1e300]),
    st.integers(-5, 5000), st.text(max_size=6),
)  # fmt: skip
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.sampled_from(NAMES), SCALARS, max_size=2))
BASE = list(dict.fromkeys([*places(base()), *places(base(user=True))]))


def at(config: Any, place: Place) -> Any:
    for key in place:
        config = config[key]
    return config


LIMITED = [(name,) for name in RLIMITS]


# A mutation is a kind, a place in the base and a value; one that no longer fits after another does nothing.
MUTATIONS = st.one_of(
    st.tuples(st.just("delete"), st.sampled_from(BASE), st.none()),
    st.tuples(st.just("replace"), st.sampled_from(BASE), VALUES),
    st.tuples(st.just("repeat"), st.sampled_from([p for p in BASE if isinstance(p[-1], int)]), st.none()),
    st.tuples(st.just("rlimit"), st.sampled_from(LIMITED), st.sampled_from(NUMBERS)),
    st.tuples(
        st.just("append"),
        st.sampled_from([p for p in BASE if isinstance(at(base(user=True), p), list)]),
        st.one_of(VALUES, st.sampled_from(OPTIONS)),
    ),
    st.tuples(
        st.just("add"),
        st.sampled_from([(), *(p for p in BASE if isinstance(at(base(user=True), p), dict))]),
        st.tuples(st.sampled_from(NAMES), VALUES),
    ),
)


def mutate(config: dict[str, Any], kind: str, place: Place, value: Any) -> None:
    try:
        if kind == "delete":
            del at(config, place[:-1])[place[-1]]
        elif kind == "replace":
            at(config, place[:-1])[place[-1]] = value
        elif kind == "repeat":
            at(config, place[:-1]).append(copy.deepcopy(at(config, place)))
        elif kind == "rlimit":
            config["process"]["rlimits"] = [{"type": place[0], "soft": value, "hard": value}]
        elif kind == "append":
            at(config, place).append(value)
        else:
            at(config, place)[value[0]] = value[1]
    except (KeyError, IndexError, TypeError, AttributeError):
        return


def reaches_the_host(config: dict[str, Any], bundle: Path) -> bool:
    """Whether the bundle would, rightly, write to directories of this machine: its root or a bind mount there."""
    root = config.get("root")
    paths = [root.get("path")] if isinstance(root, dict) else []
    mounts = config.get("mounts")
    for mount in mounts if isinstance(mounts, list) else ():
        paths += [mount.get("source")] if isinstance(mount, dict) else []
    for path in paths:
        if not isinstance(path, str) or "\0" in path or "\ud800" in path or path in ("", "proc"):
            continue
        for place in (Path("/") / path, bundle / path):
            if os.path.isdir(place) and not place.resolve().is_relative_to(bundle):
                return True
    return False


def complaint(done: "subprocess.CompletedProcess[str]", config: dict[str, Any], bundle: Path) -> str | None:
    """What is wrong with the way that `run` ended; None when all is well."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("pymigrate: warning: hooks.post")]
    errors = [line for line in lines if line.startswith("pymigrate: error: ")]
    if "Traceback" in done.stderr or "internal error" in done.stderr or "Error(" in done.stderr:
        return "a bug of ours is shown"
    if not errors:
        # The program ran; a limit may have killed it, or kept its interpreter from starting.
        own = done.returncode == 0 or done.returncode > 128 or not lines
        return None if own else f"exit code {done.returncode} without an error"
    if len(errors) > 1 or any(not line.startswith("  ") for line in lines if line not in errors):
        return "more than one error, or one of several lines"
    if done.returncode not in CODES - {0}:
        return f"exit code {done.returncode} is not in the table"
    message = errors[0].removeprefix("pymigrate: error: ")
    if len(message) > 1000:
        return f"the message has {len(message)} characters"
    if done.returncode != INVALID or message.startswith(str(bundle / "config.json")):
        return None
    if not message.startswith("config.json: "):
        return "config.json is not named"
    named = message.removeprefix("config.json: ")
    known = {dotted(place) for place in [*places(config), *BASE]} | {"the file"}
    there = any(named.startswith(place + end) for place in known for end in (": ", ".", "["))
    absent = re.match(r"[A-Za-z]+: is missing", named)
    return None if there or absent else "no field of the file is named"


def dotted(place: Place) -> str:
    """A place as messages show it: what cannot be printed is escaped."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).removeprefix(".")
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def run(config: dict[str, Any], directory: Path) -> "subprocess.CompletedProcess[str]":
    """Run the container of a config.json in a fresh bundle below `directory`."""
    bundle = directory / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    bundle.mkdir()
    subprocess.run(["cp", "-a", ROOTFS, bundle / "rootfs"], check=True)
    (bundle / "config.json").write_text(json.dumps(config))
    return subprocess.run(
        [*PYMIGRATE, "--root", directory / "root", "run", "-b", bundle, ID],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="backslashreplace", timeout=90,
    )  # fmt: skip


@pytest.mark.timeout(120 + 3 * EXAMPLES)
@settings(
    max_examples=EXAMPLES, deadline=None, print_blob=True, derandomize=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(user=st.booleans(), mutations=st.lists(MUTATIONS, min_size=1, max_size=3))
def test_any_config_runs_or_is_refused(tmp_path: Path, user: bool, mutations: list[tuple[str, Place, Any]]) -> None:
    config = base(user=user)
    for mutation in mutations:
        mutate(config, *mutation)
    if reaches_the_host(config, tmp_path / "bundle"):
        return
    names = own_names(config)
    before = leaks(tmp_path / "root", *names)
    done = run(config, tmp_path)
    problem = complaint(done, config, tmp_path / "bundle")
    assert problem is None, (problem, done.returncode, done.stderr)
    assert left(before, tmp_path / "root", *names) == []


def own_names(config: dict[str, Any]) -> list[str]:
    """What its cgroups are called: they lie where linux.cgroupsPath says."""
    linux = config.get("linux")
    path = linux.get("cgroupsPath") if isinstance(linux, dict) else None
    parts = [part for part in path.split("/") if len(part) > 1 and part != ".."] if isinstance(path, str) else []
    return [ID, *(f"/{part}" for part in parts[:1])]


@pytest.mark.parametrize("user", [False, True], ids=["plain", "user namespace"])
def test_the_unchanged_config_runs(tmp_path: Path, user: bool) -> None:
    before = leaks(tmp_path / "root", ID)
    done = run(base(user=user), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert left(before, tmp_path / "root", ID) == []
