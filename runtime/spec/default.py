"""A default config.json of a container that can be moved (terminal false, read-only root, no seccomp, /tmp a tmpfs)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
_MASKED = ("acpi", "asound", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "scsi")
_READONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")


def _mount(destination: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}


def default_spec() -> dict[str, Any]:
    """Return the value of the file."""
    return {
        "ociVersion": "1.2.0",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {name: list(_CAPABILITIES) for name in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "pymigrate",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
            _mount("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
            _mount("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
            _mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
            _mount("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"),
            _mount("/tmp", "tmpfs", "nosuid", "nodev", "mode=1777"),
        ],
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}, *_devices()]},
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")],
            "maskedPaths": [f"/proc/{name}" for name in _MASKED] + ["/sys/firmware"],
            "readonlyPaths": [f"/proc/{name}" for name in _READONLY],
        },
    }


def _devices() -> list[dict[str, Any]]:
    """Return the rules for the devices that every container has (runtime-spec, default devices), and its terminals."""
    numbers = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, None)]
    return [
        {"allow": True, "type": "c", "major": major, **({"minor": minor} if minor is not None else {}), "access": "rwm"}
        for major, minor in numbers
    ] + [{"allow": True, "type": kind, "access": "m"} for kind in "cb"]


def rootless(value: dict[str, Any], uid: int, gid: int) -> dict[str, Any]:
    """Change a default spec for an unprivileged user, who becomes root of the container; without limits."""
    linux = value["linux"]
    linux["namespaces"] = [entry for entry in linux["namespaces"] if entry["type"] != "network"] + [{"type": "user"}]
    linux["uidMappings"] = [{"containerID": 0, "hostID": uid, "size": 1}]
    linux["gidMappings"] = [{"containerID": 0, "hostID": gid, "size": 1}]
    del linux["resources"]
    # Without its own network namespace it may not mount sysfs; the terminals' group is not one of its ids.
    sys = {"destination": "/sys", "type": "none", "source": "/sys"}
    sys["options"] = ["rbind", "nosuid", "noexec", "nodev", "ro"]  # type: ignore[assignment]
    value["mounts"] = [
        sys if entry["destination"] == "/sys" else entry
        for entry in value["mounts"]
        if entry["destination"] != "/sys/fs/cgroup"
    ]
    for entry in value["mounts"]:
        entry["options"] = [option for option in entry.get("options", []) if option != "gid=5"]
    return value
