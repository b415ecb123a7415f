"""Containers whose program is Python: this machine's /usr, read-only, is all that is in them."""

import json
from pathlib import Path
from typing import Any

_LINKS = ("bin", "lib", "lib64", "sbin")
_PLACES = ("dev", "proc", "sys", "tmp", "usr", "etc")


def write_python_bundle(bundle: Path, program: str, *arguments: str, **changes: Any) -> None:
    """A bundle that runs the text `program`; `changes` replace top-level fields of the default config.json.

    The program may do what root may do in its namespaces.
    """
    from runtime.spec.default import default_spec

    rootfs = bundle / "rootfs"
    for name in _PLACES:
        (rootfs / name).mkdir(parents=True)
    for name in _LINKS:
        (rootfs / name).symlink_to(f"usr/{name}")
    (rootfs / "program.py").write_text(program)
    config = default_spec() | changes
    config["process"]["args"] = ["python3", "-I", "-S", "-u", "/program.py", *arguments]
    for kind in ("bounding", "effective", "permitted"):
        config["process"]["capabilities"][kind] += ["CAP_NET_RAW", "CAP_NET_ADMIN", "CAP_SYS_ADMIN"]
    config["mounts"].insert(0, {"destination": "/usr", "type": "none", "source": "/usr", "options": ["bind", "ro"]})
    (bundle / "config.json").write_text(json.dumps(config))
