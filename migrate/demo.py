"""`make demo`: a running Redis is moved between two hosts and back, then snapshotted and restored twice.

Everything is done through the command line, as a user would: two lab hosts with a real sshd each; a container with
a real redis-server that holds 50,000 keys, and a program beside it that increments a counter over one connection.
After every step the keys are compared with a digest taken before, the counter must have gone on and never back, and
the process ids inside must be the same.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrate.ui.text import duration, size

KEYS = 50_000
ROOTFS = Path("/var/cache/pymigrate/rootfs/redis")
BUNDLE = "/var/lib/pymigrate/demo/web"
SNAPSHOT = "/var/lib/pymigrate/demo/web.snapshot"
LAB = "demo"
STEP_TIMEOUT = 180.0

# Runs inside Redis for every tick: counts, and remembers the longest time between two ticks, in microseconds.
_TICK = (
    "local t=redis.call('TIME') local now=t[1]*1000000+t[2] local last=redis.call('GET','last') "
    "if last and now-last>tonumber(redis.call('GET','gap') or 0) then redis.call('SET','gap',now-last) end "
    "redis.call('SET','last',string.format('%.0f',now)) return redis.call('INCR','counter')"
)
_INIT = f"""
redis-server --save '' --appendonly no --dir /tmp --bind 127.0.0.1 --loglevel warning &
until redis-cli ping 2>/dev/null | grep -q PONG; do usleep 20000; done
while :; do echo "EVAL \\"{_TICK}\\" 0"; usleep 5000; done | redis-cli > /dev/null &
echo ready
wait
"""


_LIST_PROCESSES = (
    'for p in /proc/[0-9]*; do [ "$p" = /proc/$$ ] || '
    "{ read -r name < $p/comm && echo ${p#/proc/} $name; }; done 2>/dev/null"
)


class DemoFailed(Exception):
    """Something the demo checks did not hold."""


@dataclass(frozen=True)
class Seen:
    """What must survive: the keys' digest, the processes inside (pid and name), and how far the counter is."""

    digest: str
    processes: tuple[str, ...]
    counter: int


class Demo:
    """The steps, each a call of the command line."""

    def __init__(self) -> None:
        self._env = {**os.environ, "PYMIGRATE_LAB": LAB}
        self._start = time.monotonic()

    def run(self) -> None:
        self._say("lab", "two hosts with a real sshd each, linked by a bridge")
        self._local("lab", "down")
        try:
            self._local("lab", "up")
            self._container()
            self._say("redis", f"setting {KEYS} keys")
            self._fill()
            before = self._look("host1")
            self._say("redis", f"digest {before.digest[:16]}..., counter at {before.counter}")
            self._move("host1", "host2", before)
            self._move("host2", "host1", self._look("host2"))
            self._snapshots()
        finally:
            self._local("lab", "down")
        self._say("done", "nothing was lost")

    def _container(self) -> None:
        self._say("host1", "a container with redis-server and a program that counts in it")
        self._on("host1", "mkdir", "-p", BUNDLE)
        self._on("host1", "cp", "-a", str(ROOTFS), f"{BUNDLE}/rootfs")
        self._on("host1", "pymigrate", "spec", "--bundle", BUNDLE)
        config = json.loads(self._on("host1", "cat", f"{BUNDLE}/config.json"))
        config["process"]["args"] = ["/bin/sh", "-c", _INIT]
        config["hostname"] = "web"
        self._on("host1", "tee", f"{BUNDLE}/config.json", stdin=json.dumps(config, indent=2))
        self._on("host1", "pymigrate", "run", "--detach", "--bundle", BUNDLE, "web")
        deadline = time.monotonic() + 30
        while "ready" not in self._on("host1", "pymigrate", "logs", "web"):
            if time.monotonic() > deadline:
                raise DemoFailed("redis-server did not start: " + self._on("host1", "pymigrate", "logs", "web"))
            time.sleep(0.1)

    def _fill(self) -> None:
        lines = []
        for number in range(KEYS):
            value = hashlib.sha256(str(number).encode()).hexdigest()
            lines.append(f"SET key:{number:05} {value}\r\n")
        said = self._on("host1", "pymigrate", "exec", "web", "redis-cli", "--pipe", stdin="".join(lines))
        if f"errors: 0, replies: {KEYS}" not in said:
            raise DemoFailed(f"the keys could not be set: {said}")

    def _look(self, host: str) -> Seen:
        """Read back everything that must survive a move."""
        names = " ".join(f"key:{number:05}" for number in range(KEYS))
        values = self._on(host, "pymigrate", "exec", "web", "redis-cli", stdin=f"MGET {names}\n")
        if len(values.split()) != KEYS:
            raise DemoFailed(f"{host}: {len(values.split())} of {KEYS} keys are there")
        # The counting shell starts a short-lived usleep for each tick: what is seen only once is not meant.
        listings = [
            set(self._on(host, "pymigrate", "exec", "web", "/bin/sh", "-c", _LIST_PROCESSES).splitlines())
            for _ in range(3)
        ]
        processes = tuple(sorted(set.intersection(*listings)))
        return Seen(hashlib.sha256(values.encode()).hexdigest(), processes, self._counter(host))

    def _counter(self, host: str) -> int:
        return int(self._on(host, "pymigrate", "exec", "web", "redis-cli", "GET", "counter"))

    def _check(self, host: str, before: Seen, *, not_before: int) -> Seen:
        now = self._look(host)
        if now.digest != before.digest:
            raise DemoFailed(f"{host}: the keys are not what they were")
        if now.processes != before.processes:
            raise DemoFailed(f"{host}: the processes are not what they were: {before.processes} -> {now.processes}")
        later = self._counter(host)
        if not not_before <= now.counter < later:
            raise DemoFailed(f"{host}: the counter does not go on: {not_before}, {now.counter}, {later}")
        self._say(
            host, f"{KEYS} keys equal, {len(now.processes)} processes with the same ids, counter {later} and going on"
        )
        return now

    def _move(self, source: str, target: str, before: Seen) -> None:
        self._say("move", f"pymigrate move web {target}")
        self._on(source, "pymigrate", "exec", "web", "redis-cli", "SET", "gap", "0")
        lines = self._on(source, "pymigrate", "--json", "move", "web", target).splitlines()
        report: dict[str, Any] = json.loads(lines[-1])
        for name, seconds in report["phases"].items():
            print(f"             {name:<14} {duration(seconds):>8}  {'#' * max(1, round(seconds * 60))}"[:100])
        gap = int(float(self._on(target, "pymigrate", "exec", "web", "redis-cli", "GET", "gap"))) / 1e6
        self._say(
            "move",
            f"downtime {duration(report['downtime_s'])} (longest gap between two ticks inside: {duration(gap)}), "
            f"total {duration(report['total_s'])}, {size(report['bytes_sent'])} sent",
        )
        if '"web"' in self._on(source, "pymigrate", "list", "--format", "json"):
            raise DemoFailed(f"{source} still has the container")
        self._check(target, before, not_before=before.counter)

    def _snapshots(self) -> None:
        self._say("snapshot", f"pymigrate snapshot save web {SNAPSHOT}")
        before = self._look("host1")
        self._on("host1", "pymigrate", "snapshot", "save", "web", SNAPSHOT)
        for line in self._on("host1", "pymigrate", "snapshot", "show", SNAPSHOT).splitlines():
            print(f"             {line}")
        for turn in ("first", "second"):
            self._on("host1", "pymigrate", "delete", "--force", "web")
            self._say("snapshot", f"container deleted; restoring it, {turn} time")
            self._on("host1", "pymigrate", "snapshot", "restore", SNAPSHOT)
            self._check("host1", before, not_before=before.counter)
        self._on("host1", "pymigrate", "delete", "--force", "web")

    def _on(self, host: str, *argv: str, stdin: str | None = None) -> str:
        return self._local("lab", "exec", host, "--", *argv, stdin=stdin)

    def _local(self, *argv: str, stdin: str | None = None) -> str:
        command = [sys.executable, "-m", "migrate.cli", *argv]
        try:
            done = subprocess.run(
                command, input=stdin or "", capture_output=True, text=True, env=self._env, timeout=STEP_TIMEOUT
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"no end after {STEP_TIMEOUT:g} s: pymigrate {' '.join(argv)[:200]}") from None
        if done.returncode != 0:
            words = (done.stderr or done.stdout).strip()
            raise DemoFailed(f"exit status {done.returncode}: pymigrate {' '.join(argv)[:200]}\n{words}")
        return done.stdout

    def _say(self, what: str, text: str) -> None:
        print(f"{time.monotonic() - self._start:7.2f} s  {what:<9} {text}", flush=True)


def main() -> int:
    """Run the demo; 0 when everything it checks has held."""
    if not ROOTFS.is_dir() or shutil.which("ip") is None:
        print(f"{ROOTFS} is missing: run `make setup`", file=sys.stderr)
        return 1
    try:
        Demo().run()
    except DemoFailed as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
