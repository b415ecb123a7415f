"""Move a running Redis to another host and back, then snapshot it and restore it twice.

Everything uses the command line, as a user would: a container with a real redis-server that holds 50,000 keys, and a
program beside it that increments a counter over one connection. After every step the keys must have the digest taken
before, the counter must have grown and keep growing, and the process ids inside must be the same.
"""

import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from migrate.demo.client import Client
from migrate.demo.hosts import Hosts
from migrate.errors import DemoFailed
from migrate.paths import DEMO as HERE
from migrate.paths import DEMO_ROOTFS as ROOTFS
from migrate.ui.text import duration, size

KEYS = 50_000
START_TIMEOUT = 60.0

# Redis runs it for every tick: it counts, and records the longest time between two ticks, in microseconds.
_TICK = (
    "local t=redis.call('TIME') local now=t[1]*1000000+t[2] local last=redis.call('GET','last') "
    "if last and now-last>tonumber(redis.call('GET','gap') or 0) then redis.call('SET','gap',now-last) end "
    "redis.call('SET','last',string.format('%.0f',now)) return redis.call('INCR','counter')"
)
_INIT = f"""
redis-server --save '' --appendonly no --dir /tmp --bind 0.0.0.0 --protected-mode no --loglevel warning &
until redis-cli ping 2>/dev/null | grep -q PONG; do usleep 20000; done
while :; do echo "EVAL \\"{_TICK}\\" 0"; usleep 5000; done | redis-cli > /dev/null &
echo ready
wait
"""


# The counting shell starts a short-lived usleep for each tick, so only processes in all listings count.
_LISTINGS = 3
_LIST_PROCESSES = """
for turn in 1 2 3; do
    for p in /proc/[0-9]*; do
        [ "$p" = /proc/$$ ] || { read -r name < $p/comm && echo ${p#/proc/} $name; } 2> /dev/null
    done
    usleep 50000
done
"""


@dataclass(frozen=True)
class Seen:
    """The state that must survive: the keys' digest, the processes inside (pid and name), the counter's value."""

    digest: str
    processes: tuple[str, ...]
    counter: int


class Demo:
    """The steps of the demo, each a call of the command line."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts, self._on = hosts, hosts.on
        self._container = hosts.container
        self._bundle = f"{HERE}/{hosts.container}"
        self._snapshot = f"{HERE}/{hosts.container}.snapshot"
        self._start = time.monotonic()

    def run(self) -> None:
        """Run the whole demo, and remove everything it has made. Raises DemoFailed if a check fails."""
        hosts, problems = self._hosts, []
        try:
            self._begin()
            before = self._look(hosts.source)
            self._say("redis", f"digest {before.digest[:16]}..., counter at {before.counter}")
            client = hosts.client()
            try:
                there = self._move(hosts.source, hosts.target, before, client)
                back = self._move(hosts.target, hosts.source, there, client)
            finally:
                if client is not None:
                    client.close()
            self._snapshots(back)
        finally:
            problems = hosts.down()
            for problem in problems:
                self._say("left", problem)
        if problems:
            raise DemoFailed(f"the demo could not remove everything it has made: {'; '.join(problems)}")
        self._say("done", "nothing was lost")

    def start(self) -> None:
        """Start only the container, with its keys set and its counter running, and leave it. Raises DemoFailed."""
        try:
            self._begin()
        except BaseException:
            self._hosts.down()
            raise
        self._say(
            "done",
            f"try: pymigrate move {self._container} HOST; pymigrate exec {self._container} redis-cli GET counter",
        )

    def _begin(self) -> None:
        if not ROOTFS.is_dir():
            raise DemoFailed(f"{ROOTFS} is missing", remedy="run `make setup`, or vagrant/provision.sh --demo")
        self._say("hosts", self._hosts.description)
        self._hosts.up()
        self._run_container()
        self._say("redis", f"setting {KEYS} keys")
        self._fill()

    def _run_container(self) -> None:
        host = self._hosts.source
        self._say(host, "a container with redis-server and a program that counts in it")
        self._on(host, "mkdir", "-p", self._bundle)
        self._on(host, "cp", "-a", str(ROOTFS), f"{self._bundle}/rootfs")
        self._on(host, "pymigrate", "spec", "--bundle", self._bundle)
        config = json.loads(self._on(host, "cat", f"{self._bundle}/config.json"))
        config["process"]["args"] = ["/bin/sh", "-c", _INIT]
        config["hostname"] = self._container
        self._on(host, "tee", f"{self._bundle}/config.json", stdin=json.dumps(config, indent=2))
        net = ["--net", self._hosts.net] if self._hosts.net else []
        self._on(host, "pymigrate", "run", "--detach", "--bundle", self._bundle, *net, self._container)
        deadline = time.monotonic() + START_TIMEOUT
        while "ready" not in self._on(host, "pymigrate", "logs", self._container):
            if time.monotonic() > deadline:
                raise DemoFailed("redis-server did not start: " + self._on(host, "pymigrate", "logs", self._container))
            time.sleep(0.1)

    def _fill(self) -> None:
        lines = []
        for number in range(KEYS):
            value = hashlib.sha256(str(number).encode()).hexdigest()
            lines.append(f"SET key:{number:05} {value}\r\n")
        said = self._on(
            self._hosts.source, "pymigrate", "exec", self._container, "redis-cli", "--pipe", stdin="".join(lines)
        )
        if f"errors: 0, replies: {KEYS}" not in said:
            raise DemoFailed(f"the keys could not be set: {said}")

    def _look(self, host: str) -> Seen:
        """Return the state that must survive a move."""
        names = " ".join(f"key:{number:05}" for number in range(KEYS))
        values = self._on(host, "pymigrate", "exec", self._container, "redis-cli", stdin=f"MGET {names}\n")
        if len(values.split()) != KEYS:
            raise DemoFailed(f"{host}: only {len(values.split())} of {KEYS} keys are left")
        listed = self._on(host, "pymigrate", "exec", self._container, "/bin/sh", "-c", _LIST_PROCESSES).splitlines()
        processes = tuple(sorted(line for line, times in Counter(listed).items() if times == _LISTINGS))
        return Seen(hashlib.sha256(values.encode()).hexdigest(), processes, self._counter(host))

    def _counter(self, host: str) -> int:
        return int(self._on(host, "pymigrate", "exec", self._container, "redis-cli", "GET", "counter"))

    def _check(self, host: str, before: Seen, *, not_before: int) -> Seen:
        now = self._look(host)
        if now.digest != before.digest:
            raise DemoFailed(f"{host}: the keys have changed")
        if now.processes != before.processes:
            raise DemoFailed(f"{host}: the processes have changed: {before.processes} -> {now.processes}")
        later = self._counter(host)
        if not not_before <= now.counter < later:
            raise DemoFailed(f"{host}: the counter does not grow: {not_before}, {now.counter}, {later}")
        self._say(
            host, f"{KEYS} keys equal, {len(now.processes)} processes with the same ids, counter {later} and growing"
        )
        return now

    def _move(self, source: str, target: str, before: Seen, client: Client | None) -> Seen:
        if client is not None:
            client.visits()
        self._say("move", f"pymigrate move {self._container} {target}")
        self._on(source, "pymigrate", "exec", self._container, "redis-cli", "SET", "gap", "0")
        lines = self._on(source, "pymigrate", "--json", "move", self._container, target).splitlines()
        report: dict[str, Any] = json.loads(lines[-1])
        for name, seconds in report["phases"].items():
            print(f"             {name:<14} {duration(seconds):>8}  {'#' * max(1, round(seconds * 60))}"[:100])
        gap = int(float(self._on(target, "pymigrate", "exec", self._container, "redis-cli", "GET", "gap"))) / 1e6
        self._say(
            "move",
            f"downtime {duration(report['downtime_s'])} (longest gap between two ticks inside: {duration(gap)}), "
            f"total {duration(report['total_s'])}, {size(report['bytes_sent'])} sent",
        )
        if client is not None:
            visits = client.visits()
            self._say(
                "client",
                f"{visits.answers} answers meanwhile, over one connection; the longest took {duration(visits.longest)}",
            )
        if self._container in self._on(source, "pymigrate", "list", "-q").split():
            raise DemoFailed(f"{source} still has the container")
        return self._check(target, before, not_before=before.counter)

    def _snapshots(self, before: Seen) -> None:
        self._say("snapshot", f"pymigrate snapshot save {self._container} {self._snapshot}")
        host = self._hosts.source
        self._on(host, "pymigrate", "snapshot", "save", self._container, self._snapshot)
        for line in self._on(host, "pymigrate", "snapshot", "show", self._snapshot).splitlines():
            print(f"             {line}")
        for turn in ("first", "second"):
            self._on(host, "pymigrate", "delete", "--force", self._container)
            self._say("snapshot", f"container deleted; restoring it, {turn} time")
            self._on(host, "pymigrate", "snapshot", "restore", self._snapshot)
            self._check(host, before, not_before=before.counter)
        self._on(host, "pymigrate", "delete", "--force", self._container)

    def _say(self, what: str, text: str) -> None:
        print(f"{time.monotonic() - self._start:7.2f} s  {what:<9} {text}", flush=True)
