"""Real services out of Debian's packages, each in a container, with a client that notices everything that goes wrong.

A client runs at another host than the container and says, when it is told to end, how much it did and how long the
longest pause was that it saw. `Service.check` then compares what it did with what the service has.
"""

import abc
import hashlib
import json
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from runtime.spec.default import default_spec
from tests.support.hosts import Hosts

ROOTFS = Path("/var/cache/pymigrate/rootfs/services")  # also holds the clients' programs
START_TIMEOUT = 90.0
END_TIMEOUT = 120.0

# One connection; every answer must be the one before plus one.
_INCREMENT = """
import json, select, socket, sys, time
sock = socket.create_connection((sys.argv[1], 6379), timeout=60)
stream, count, gap, last = sock.makefile("rb"), 0, 0.0, time.monotonic()
while not select.select([0], [], [], 0)[0]:
    sock.sendall(b"INCR counter\\r\\n")
    answer = stream.readline()
    assert answer == b":%d\\r\\n" % (count + 1), answer
    now = time.monotonic()
    count, gap, last = count + 1, max(gap, now - last), now
    if count == 1:
        print("ready", flush=True)
    time.sleep(0.001)
print(json.dumps({"done": count, "gap": gap}))
"""
# Takes the digest of what curl gets, and asks for a short page meanwhile, again and again over one connection: curl
# limits a rate by reading nothing for seconds, so that its own pauses say nothing. Ends with the file.
_DOWNLOAD = """
import hashlib, http.client, json, subprocess, sys, threading, time
argv = ["curl", "-sS", "--limit-rate", sys.argv[2], "-w", "%{stderr}%{num_connects} %{http_code}"]
curl = subprocess.Popen([*argv, f"http://{sys.argv[1]}/file"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
digest, count = hashlib.sha256(), 0
def download():
    global count
    while data := curl.stdout.read1(65536):
        digest.update(data)
        count += len(data)
thread = threading.Thread(target=download)
thread.start()
connection, gap, asked = http.client.HTTPConnection(sys.argv[1], timeout=60), 0.0, 0
connection.auto_open = 0
connection.connect()
while thread.is_alive() or not asked:
    began = time.monotonic()
    connection.request("GET", "/ready")
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, b"yes")
    gap, asked = max(gap, time.monotonic() - began), asked + 1
    if asked == 1:
        print("ready", flush=True)
    time.sleep(0.002)
words = curl.stderr.read().decode()
print(json.dumps({"done": count, "gap": gap, "digest": digest.hexdigest(), "status": curl.wait(), "words": words}))
"""
# pgbench ends in good order when its alarm goes off; its log has the time that each transaction took.
_TRANSACTIONS = """
import glob, json, os, re, signal, subprocess, sys
programs, address, clients, scale, rate = sys.argv[1:]
common = ["-h", address, "-U", "postgres", "postgres"]
subprocess.run([programs + "/pgbench", "-i", "-q", "-s", scale, *common], check=True, stderr=subprocess.DEVNULL)
pgbench = subprocess.Popen(
    [programs + "/pgbench", *"-n -T 3600 -P 1 -l --log-prefix=/tmp/log -R".split(), rate, "-c", clients, *common],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
words = []
while not words or "progress" not in words[-1]:
    words.append(pgbench.stderr.readline())
    assert words[-1], words
print("ready", flush=True)
sys.stdin.read()
pgbench.send_signal(signal.SIGALRM)
out, more = pgbench.communicate(timeout=60)
assert pgbench.returncode == 0, more
lines = [line.split() for path in glob.glob("/tmp/log.*") for line in open(path)]
# latency includes the time that a transaction waited for its turn (-R): the last column
gap = max(int(line[2]) - int(line[6]) for line in lines) / 1e6
print(json.dumps({
    "done": int(re.search("actually processed: ([0-9]+)", out)[1]), "gap": gap,
    "failed": int((re.search("failed transactions: ([0-9]+)", out) or "00")[1]), "words": more.count("rror"),
}))
"""
_SUMS = (
    "select (select sum(abalance) from pgbench_accounts) = sum(delta), (select sum(bbalance) from pgbench_branches) = "
    "sum(delta), (select sum(tbalance) from pgbench_tellers) = sum(delta), count(*) from pgbench_history"
)
_WAIT = """
import json, sys
print("ready", flush=True)
sys.stdin.read()
print(json.dumps({"done": 0, "gap": 0.0}))
"""
# Squares modulo N, and says where it is and how long the longest step took. Whoever knows the factors of N finds what n
# squarings come to at once: it is the 2^n-th power, and of that exponent only the rest modulo (p-1)(q-1) counts.
_CHAIN = """
import time
value, gap, number, last = 3, 0.0, 0, time.monotonic()
while True:
    for _ in range({links}):
        value = value * value % {modulus}
    now = time.monotonic()
    number, gap, last = number + 1, max(gap, now - last), now
    print(number, gap, value, flush=True)
"""
_FACTORS = (2**127 - 1, 2**521 - 1)


@dataclass(frozen=True)
class Seen:
    """What a client saw: how much it did, its longest pause in seconds, and more that its `check` wants."""

    done: int
    gap: float
    more: dict[str, Any]


class Client:
    """A program beside a service that runs until it is told to end."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def end(self) -> Seen:
        """Tell it to end, and take what it has seen. Anything that went wrong for it is an AssertionError."""
        out, words = self._process.communicate(timeout=END_TIMEOUT)
        assert self._process.returncode == 0, (out, words)
        fields = json.loads(out.splitlines()[-1])
        return Seen(fields.pop("done"), fields.pop("gap"), fields)


class Service(abc.ABC):
    """A container `name` with one real service, at an address of its own."""

    name: ClassVar[str]
    address: ClassVar[str]
    allow: ClassVar[tuple[str, ...]] = ()
    owner: ClassVar[int] = 0  # of the root file system
    rootfs: ClassVar[Path] = ROOTFS
    client_host: ClassVar[str] = "client"

    @abc.abstractmethod
    def arguments(self) -> list[str]:
        """What the container runs."""

    def prepare(self, rootfs: Path) -> None:
        """Add to the root file system."""
        del rootfs

    def configure(self, config: dict[str, Any]) -> None:
        """Change the default config.json."""
        del config

    @abc.abstractmethod
    def program(self) -> list[str]:
        """A Python program and its arguments, for the client; it prints "ready", then a JSON object in the end."""

    @abc.abstractmethod
    def is_ready(self, hosts: Hosts, host: str) -> bool:
        """Whether the service answers."""

    def check(self, hosts: Hosts, host: str, client: Client) -> Seen:
        """End the client. What it did must be there, and nothing else."""
        seen = client.end()
        self.compare(hosts, host, seen)
        return seen

    def compare(self, hosts: Hosts, host: str, seen: Seen) -> None:
        """What the client did against what the service has."""
        raise NotImplementedError

    def inside(self, hosts: Hosts, host: str, *argv: str) -> str:
        """What a program in the container prints, whatever its exit status."""
        return hosts.on(host, "pymigrate", "exec", self.name, *argv, check=False).stdout

    def start(self, hosts: Hosts, host: str) -> None:
        """Make the bundle at a host, run it, and wait until it answers."""
        config = default_spec()
        config["process"]["args"] = self.arguments()
        config["annotations"] = {"io.pymigrate.net": f"bridge=br0,ip={self.address}/24"}
        self.configure(config)
        place = f"/var/lib/pymigrate/test/{self.name}"
        with tempfile.TemporaryDirectory() as directory:
            bundle = Path(directory, self.name)
            bundle.mkdir()
            shutil.copytree(self.rootfs, bundle / "rootfs", symlinks=True)
            self.prepare(bundle / "rootfs")
            (bundle / "config.json").write_text(json.dumps(config))
            hosts.put(host, bundle, place)
        if self.owner:
            hosts.sh(host, f"chown -hR {self.owner}:{self.owner} {place}/rootfs")
        hosts.on(host, "pymigrate", "run", "-d", "-b", place, self.name)
        deadline = time.monotonic() + START_TIMEOUT
        while not self.is_ready(hosts, host):
            assert time.monotonic() < deadline, hosts.on(host, "pymigrate", "logs", self.name).stdout
            time.sleep(0.1)

    @contextmanager
    def client(self, hosts: Hosts) -> Iterator[Client]:
        """A client at work, from its first success on."""
        mounts = f"mount -t tmpfs tmpfs {ROOTFS}/tmp && mount --bind /dev {ROOTFS}/dev"
        inside = f'{mounts} && exec chroot {ROOTFS} python3 -c "$0" "$@"'
        argv = ("unshare", "-m", "--kill-child", "sh", "-c", inside, *self.program())
        process = hosts.start(self.client_host, *argv, stdin=subprocess.PIPE)
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first == "ready\n", (first, process.communicate())
            yield Client(process)
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


class Redis(Service):
    """A client increments a counter over one connection."""

    name, address = "redis", "10.88.0.11"

    def arguments(self) -> list[str]:
        return ["redis-server", "--save", "", "--dir", "/tmp", "--bind", "0.0.0.0", "--protected-mode", "no"]

    def program(self) -> list[str]:
        return [_INCREMENT, self.address]

    def is_ready(self, hosts: Hosts, host: str) -> bool:
        return "PONG" in self.inside(hosts, host, "redis-cli", "ping")

    def compare(self, hosts: Hosts, host: str, seen: Seen) -> None:
        assert self.inside(hosts, host, "redis-cli", "get", "counter").strip() == str(seen.done)


class Nginx(Service):
    """A client downloads a large file slowly, over one connection. It ends by itself."""

    name, address = "nginx", "10.88.0.12"

    def __init__(self, megabytes: int = 64, rate: str = "4M") -> None:
        self._size, self._rate, self._digest = megabytes << 20, rate, ""

    def arguments(self) -> list[str]:
        return ["nginx", "-c", "/etc/nginx/test.conf"]

    def prepare(self, rootfs: Path) -> None:
        (rootfs / "etc/nginx/test.conf").write_text(
            "daemon off; user root root; worker_processes 2; pid /tmp/pid; error_log stderr;\n"
            "events {}\nhttp { access_log off; sendfile on; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p;\n"
            "fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;\n"
            "keepalive_requests 10000000; server { listen 80; root /srv; location = /ready { return 200 yes; } } }\n"
        )
        (rootfs / "srv").mkdir()
        (rootfs / "var/log/nginx").mkdir(parents=True)
        digest = hashlib.sha256()
        with (rootfs / "srv/file").open("wb") as file:
            for number in range(self._size >> 20):
                data = hashlib.shake_128(str(number).encode()).digest(1 << 20)
                digest.update(data)
                file.write(data)
        self._digest = digest.hexdigest()

    def configure(self, config: dict[str, Any]) -> None:
        for names in config["process"]["capabilities"].values():
            names += ["CAP_SETUID", "CAP_SETGID"]

    def program(self) -> list[str]:
        return [_DOWNLOAD, self.address, self._rate]

    def is_ready(self, hosts: Hosts, host: str) -> bool:
        return "yes" in self.inside(hosts, host, "wget", "-qO", "-", "http://127.0.0.1/ready")

    def compare(self, hosts: Hosts, host: str, seen: Seen) -> None:
        assert (seen.done, seen.more["digest"]) == (self._size, self._digest)
        assert (seen.more["status"], seen.more["words"]) == (0, "1 200")  # one connection


class Postgres(Service):
    """pgbench holds connections open; no transaction may fail, and the sums must agree.

    PostgreSQL does not run as root, and CRIU needs CAP_SYS_RESOURCE for other users: a user namespace has both.
    Its data lie in the container's own writable root file system.
    """

    name, address = "postgres", "10.88.0.13"
    allow = ("writable-rootfs",)
    owner = 100000
    clients = 4
    scale = 2
    rate = 200  # transactions a second
    initdb, settings = "", ""  # more arguments of initdb and of postgres

    def __init__(self) -> None:
        (self._programs,) = (f"/{path.relative_to(ROOTFS)}" for path in ROOTFS.glob("usr/lib/postgresql/*/bin"))

    def arguments(self) -> list[str]:
        make = f"{self._programs}/initdb -D /srv -A trust -N -E UTF8 --locale C {self.initdb} > /dev/null"
        allow = "echo 'host all all all trust' >> /srv/pg_hba.conf"
        serve = f"exec {self._programs}/postgres -D /srv -h 0.0.0.0 -k /tmp {self.settings}"
        return ["sh", "-ec", f"{make}\n{allow}\n{serve}"]

    def prepare(self, rootfs: Path) -> None:
        (rootfs / "srv").mkdir(mode=0o700)
        (rootfs / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\npostgres:x:1000:1000::/srv:/bin/sh\n")

    def configure(self, config: dict[str, Any]) -> None:
        config["root"]["readonly"] = False
        config["linux"]["namespaces"].append({"type": "user"})
        # 1000 inside is the root file system's owner outside.
        for kind in ("uidMappings", "gidMappings"):
            config["linux"][kind] = [
                {"containerID": 0, "hostID": self.owner + 1, "size": 1000},
                {"containerID": 1000, "hostID": self.owner, "size": 1},
            ]
        config["process"]["user"] = {"uid": 1000, "gid": 1000}

    def program(self) -> list[str]:
        return [_TRANSACTIONS, self._programs, self.address, *map(str, (self.clients, self.scale, self.rate))]

    def is_ready(self, hosts: Hosts, host: str) -> bool:
        return "accepting" in self.inside(hosts, host, f"{self._programs}/pg_isready", "-h", "/tmp")

    def compare(self, hosts: Hosts, host: str, seen: Seen) -> None:
        assert (seen.more["failed"], seen.more["words"]) == (0, 0)
        sums = self.inside(hosts, host, f"{self._programs}/psql", "-h", "/tmp", "-Atc", _SUMS, "postgres")
        assert sums.strip() == f"t|t|t|{seen.done}"


class Interpreter(Service):
    """Python computes. It has no client: its log tells."""

    name, address = "interpreter", "10.88.0.14"
    links = 20000  # squarings a line: of a log, only the last 2 MiB go along

    def arguments(self) -> list[str]:
        return ["python3", "-c", _CHAIN.format(links=self.links, modulus=math.prod(_FACTORS))]

    def program(self) -> list[str]:
        return [_WAIT]

    def is_ready(self, hosts: Hosts, host: str) -> bool:
        return hosts.on(host, "pymigrate", "logs", self.name).stdout.count("\n") > 0

    def check(self, hosts: Hosts, host: str, client: Client) -> Seen:
        """Every line of its log must be what it has to be."""
        client.end()
        lines = hosts.on(host, "pymigrate", "logs", self.name).stdout.splitlines()
        order, modulus = math.prod(factor - 1 for factor in _FACTORS), math.prod(_FACTORS)
        for number, line in enumerate(lines, 1):
            value = pow(3, pow(2, self.links * number, order), modulus)
            assert line.split()[::2] == [str(number), str(value)]
        return Seen(len(lines), float(lines[-1].split()[1]), {})


SERVICES: tuple[type[Service], ...] = (Redis, Nginx, Postgres, Interpreter)


@dataclass(frozen=True)
class Move:
    """One move of a service, as `pymigrate --json move` reports it."""

    to: str
    report: dict[str, Any]


@dataclass(frozen=True)
class Journey:
    """What has become of a service that was moved to and fro."""

    name: str
    moves: list[Move]
    seen: Seen


def travel(service: Service, hosts: Hosts, rounds: int) -> Journey:
    """Start a service at host1, move it to host2 and back `rounds` times under its client's eyes, and check it."""
    service.start(hosts, "host1")
    moves = []
    allow = [word for rule in service.allow for word in ("--allow", rule)]
    with service.client(hosts) as client:
        for _ in range(rounds):
            for host, other in (("host1", "host2"), ("host2", "host1")):
                done = hosts.on(host, "pymigrate", "--json", "move", *allow, service.name, other)
                moves.append(Move(other, json.loads(done.stdout.splitlines()[-1])))
        seen = service.check(hosts, "host1", client)
    hosts.on("host1", "pymigrate", "delete", "--force", service.name)
    return Journey(service.name, moves, seen)


def table(journeys: list[Journey]) -> str:
    """A line for each move: times in ms, MiB over the connection; below, the longest pause that its client saw."""
    lines = [f"{'':<12} {'to':<6}{'downtime':>9}{'total':>8}{'files':>9}{'memory':>9}"]
    for journey in journeys:
        for move in journey.moves:
            report = move.report
            files = sum(done["bytes_sent"] for done in report["passes"])
            numbers = report["downtime_s"] * 1e3, report["total_s"] * 1e3
            sizes = files / 2**20, (report["bytes_sent"] - files) / 2**20
            lines.append(
                f"{journey.name:<12} {move.to:<6}{numbers[0]:>9.0f}{numbers[1]:>8.0f}{sizes[0]:>9.2f}{sizes[1]:>9.2f}"
            )
        lines.append(f"{journey.name:<12} longest pause that its client saw: {journey.seen.gap * 1e3:.0f} ms")
    return "\n".join(lines)
