"""The features that this runtime recognizes, as features.json of the runtime-spec 1.2 (features.md, features-linux.md).

They describe the code, never this host. Lists come from the tables that the code itself uses;
tests/unit/runtime/lifecycle/test_features.py checks each claim, and each "not enabled", against what `parse` takes.
"""

from __future__ import annotations

from runtime.cgroups.systemd import ANNOTATION as PROPERTY
from runtime.spec.annotations import NET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Annotations of a config.json that change what the runtime does; a trailing "." makes one a prefix.
UNSAFE_ANNOTATIONS = (NET, PROPERTY)


def features() -> dict[str, Any]:
    """Return the document as a JSON value."""
    from runtime.linux import capabilities
    from runtime.spec import config as spec_config
    from runtime.spec import mounts as mount_spec
    from runtime.spec import seccomp

    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": list(spec_config.HOOK_POINTS),
        "mountOptions": sorted((*mount_spec.FLAGS, *mount_spec.PROPAGATIONS, *mount_spec.RECURSIVE, *mount_spec.OTHER)),
        "linux": {
            "namespaces": sorted(spec_config.NAMESPACES),
            "capabilities": list(capabilities.NUMBERS),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": False, "rdma": True},
            "seccomp": seccomp.features(),
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": True}},
        },
        "annotations": {"org.pymigrate.checkpoint.enabled": "true"},
        "potentiallyUnsafeConfigAnnotations": list(UNSAFE_ANNOTATIONS),
    }
