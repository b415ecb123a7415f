"""Bundles whose first process runs the checkers, and what they say."""

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from runtime.linux import capabilities
from runtime.spec.default import default_spec
from tests.support.hosts import Hosts, write_bundle

PROGRAMS = Path(__file__).parent
PLACE = "/var/lib/pymigrate/test/web"


def checkers(*kinds: str) -> dict[str, Any]:
    """Top-level fields of a config.json: the Python of the host, bound into the container, runs these checkers."""
    value = default_spec()
    value["process"]["args"] = ["/usr/bin/python3", "-I", "-S", "/programs/main.py", *kinds]
    value["process"]["capabilities"] = dict.fromkeys(
        ("bounding", "effective", "permitted"), sorted(capabilities.NUMBERS)
    )
    for place, source in (("/usr", "/usr"), ("/lib", "/usr/lib"), ("/lib64", "/usr/lib64")):
        value["mounts"].append({"destination": place, "source": source, "type": "bind", "options": ["bind", "ro"]})
    for mount in value["mounts"]:
        if mount["type"] == "cgroup":
            mount["options"].remove("ro")
    return value


def start(hosts: Hosts, config: dict[str, Any], *options: str, uid: int = 0, container: str = "web") -> None:
    """Run a container of such a configuration at host1; `uid` is that of its files.

    `options` come before the verb.
    """
    with tempfile.TemporaryDirectory() as directory:
        bundle = Path(directory, "web")
        write_bundle(bundle, "unused")
        shutil.copytree(PROGRAMS, bundle / "rootfs/programs", ignore=shutil.ignore_patterns("__pycache__"))
        (bundle / "rootfs/lib64").unlink()
        for name in ("usr", "lib", "lib64"):
            (bundle / "rootfs" / name).mkdir(exist_ok=True)
        (bundle / "config.json").write_text(json.dumps(config))
        hosts.put("host1", bundle, PLACE)
    hosts.sh("host1", f"chown -R {uid}:{uid} {PLACE}/rootfs")
    hosts.on("host1", "pymigrate", *options, "run", "-d", "-b", PLACE, container)


def verdicts(
    hosts: Hosts, host: str, kinds: list[str], words: tuple[str, ...], round_: int = 1, container: str = "web"
) -> dict[str, str]:
    """What each checker says, the `round_`-th time that it says one of `words`."""
    deadline = time.monotonic() + hosts.patience
    while True:
        lines = hosts.on(host, "pymigrate", "logs", container).stdout.splitlines()
        found: dict[str, list[str]] = {kind: [] for kind in kinds}
        for line in lines:
            kind, _, rest = line.partition(" ")
            if kind in found and rest.startswith(words):
                found[kind].append(rest)
        if all(len(said) >= round_ for said in found.values()):
            return {kind: said[round_ - 1] for kind, said in found.items()}
        assert time.monotonic() < deadline, [kind for kind in kinds if len(found[kind]) < round_] + lines[-20:]


def ready(hosts: Hosts, kinds: list[str], container: str = "web") -> list[str]:
    """Wait until all checkers are set up; those that this kernel lets be."""
    said = verdicts(hosts, "host1", kinds, ("ready", "skipped", "broken"), container=container)
    assert not [kind for kind, words in said.items() if words.startswith("broken")], said
    return [kind for kind, words in said.items() if words == "ready"]


def check(hosts: Hosts, host: str, kinds: list[str], round_: int = 1, container: str = "web") -> dict[str, str]:
    """Have all checkers look, and say what they find: "ok", or "failed: ..."."""
    hosts.on(host, "pymigrate", "kill", container, "USR1")
    return verdicts(hosts, host, kinds, ("ok", "failed"), round_, container)
