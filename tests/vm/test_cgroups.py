"""Control groups where version 2 has all controllers, and where systemd makes them: a machine of Debian's own."""

import json
import textwrap
from typing import Any

from tests.vm.machines import Machines

MIB = 1 << 20
# Runs at host1 with pymigrate's Python; `body` fills `out`, which is what comes back.
_SCRIPT = """
import contextlib, itertools, json, os, subprocess, sys
from runtime.cgroups import monitor as monitor_cgroup
from runtime.cgroups.cgroup import Cgroup
from runtime.cgroups.limits import denied_by_default
from runtime.errors import ContainerError
from runtime.spec.fields import Fields
from runtime.spec.resources import parse_resources

def parsed(**resources):
    return parse_resources(Fields(resources, "config.json", "linux.resources"))

def file(cgroup, name):
    return open(f"{cgroup.paths['']}/{name}").read().strip()

def child(code=""):
    code = f"import os, sys\\nsys.stdin.readline()\\n{code}"
    return subprocess.Popen(
        [sys.executable, "-IS", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

def command(*argv):
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

def shown(unit, *names):
    return {name: command("systemctl", "show", "-P", name, unit) for name in names}

OPEN = '''
for name, flags in (("zero", os.O_RDONLY), ("full", os.O_RDWR), ("kmsg", os.O_RDONLY)):
    try: os.close(os.open("/dev/" + name, flags)); print(name)
    except PermissionError: pass
'''

def opened(cgroup):
    process = child(OPEN)
    cgroup.add(process.pid)
    return process.communicate("\\n", timeout=60)[0].split()

out = {}
stack = contextlib.ExitStack()

def create(*args, pid=None, **options):
    made = Cgroup.create(*args, **options)
    stack.callback(made.remove)
    stack.callback(made.kill)
    if pid is not None:
        made.add(pid)
        made.release_claim()
    return made

with stack:
%s
print(json.dumps(out))
"""


def run(machines: Machines, body: str) -> dict[str, Any]:
    script = _SCRIPT % textwrap.indent(textwrap.dedent(body), "    ")
    done = machines.on("host1", machines.python, "-c", script, timeout=180)
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return out


def test_limits_are_files_of_version_2(machines: Machines) -> None:
    found = run(
        machines,
        """
        cgroup = create("limits", None)
        out["paths"] = cgroup.paths
        out["memory"] = []
        for limit in (100, 400, 50):
            cgroup.apply(parsed(memory={"limit": limit << 20, "swap": (limit + 1) << 20}))
            out["memory"].append([int(file(cgroup, name)) >> 20 for name in ("memory.max", "memory.swap.max")])
        cgroup.apply(parsed(memory={"swap": 70 << 20}))
        out["swap"] = int(file(cgroup, "memory.swap.max")) >> 20
        out["cpu"] = []
        for quota, period, burst in ((50000, 100000, 50000), (5000, 10000, 1000), (900000, 1000000, 900000)):
            cgroup.apply(parsed(cpu={"quota": quota, "period": period, "burst": burst}))
            out["cpu"].append([file(cgroup, "cpu.max"), file(cgroup, "cpu.max.burst")])
        cgroup.apply(parsed(cpu={"period": 950000}))
        out["period"] = file(cgroup, "cpu.max")
        device = os.stat("/").st_dev
        numbers = {"major": os.major(device), "minor": os.minor(device)}
        cgroup.apply(parsed(
            pids={"limit": 7}, cpu={"cpus": "0", "mems": "0", "shares": 2048},
            blockIO={"throttleReadBpsDevice": [{**numbers, "rate": 1 << 20}],
                     "throttleWriteIOPSDevice": [{**numbers, "rate": 9}]},
            hugepageLimits=[{"pageSize": "2MB", "limit": 4 << 20}], unified={"memory.high": "30M"},
        ))
        names = ("pids.max", "cpuset.cpus", "cpu.weight", "hugetlb.2MB.max", "hugetlb.2MB.rsvd.max", "memory.high")
        out["rest"] = [file(cgroup, name) for name in names]
        out["io"] = file(cgroup, "io.max").partition(" ")[2]
        cgroup.apply(parsed(cpu={"idle": 1, "shares": 5}))
        out["idle"] = file(cgroup, "cpu.idle")
        out["refused"] = []
        cgroup.apply(parsed(pids={"limit": -1}))
        process = child("x = bytearray(30 << 20)\\nprint('up', flush=True)\\nsys.stdin.readline()")
        cgroup.add(process.pid)
        process.stdin.write("\\n"); process.stdin.flush(); process.stdout.readline()
        for resources in (
            {"memory": {"limit": 1 << 20, "checkBeforeUpdate": True}}, {"memory": {"swappiness": 5}},
            {"unified": {"nothing.here": "1"}}, {"cpu": {"cpus": "999"}},
        ):
            try:
                cgroup.apply(parsed(**resources))
            except ContainerError as error:
                out["refused"].append(str(error).partition(": ")[0])
        out["stats"] = cgroup.stats()
        """,
    )
    assert found["paths"] == {"": "/sys/fs/cgroup/pymigrate/limits"}
    assert found["memory"] == [[100, 1], [400, 1], [50, 1]]
    assert found["swap"] == 20
    assert found["cpu"] == [["50000 100000", "50000"], ["5000 10000", "1000"], ["900000 1000000", "900000"]]
    assert found["period"] == "900000 950000"
    assert found["rest"] == ["7", "0", "174", str(4 * MIB), str(4 * MIB), str(30 * MIB)]
    assert found["io"] == f"rbps={MIB} wbps=max riops=max wiops=9"
    assert found["idle"] == "1"
    places = ("memory.limit", "memory.swappiness", "unified.nothing.here", "cpu.cpus")
    assert found["refused"] == [f"linux.resources.{place}" for place in places]
    stats = found["stats"]
    assert 20 * MIB < stats["memory"]["usage"]["usage"] <= stats["memory"]["usage"]["max"] <= 50 * MIB
    assert stats["memory"]["usage"]["limit"] == 50 * MIB
    assert stats["memory"]["swap"]["limit"] == 70 * MIB
    assert (stats["pids"]["current"], stats["cpuset"]["cpus"]) == (1, [0])
    assert stats["cpu"]["usage"]["total"] > 0
    assert "2MB" in stats["hugetlb"]


def test_devices_memory_and_freezer_of_version_2(machines: Machines) -> None:
    found = run(
        machines,
        """
        cgroup = create("devices", None)
        deny, kmsg = {"allow": False}, {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"}
        out["opened"] = [opened(cgroup)]
        new = denied_by_default(parsed())  # a container without rules
        for resources in (new, *(parsed(devices=rules) for rules in ([kmsg], [deny], [deny, kmsg], [{"allow": True}]))):
            cgroup.apply(resources)
            out["opened"].append(opened(cgroup))

        cgroup.apply(parsed(memory={"limit": 30 << 20, "swap": 30 << 20}))
        process = child("x = bytearray(100 << 20)")
        cgroup.add(process.pid)
        events = cgroup.oom_events(0.1)
        out["quiet"] = next(events)
        process.stdin.write("\\n"); process.stdin.flush()
        out["events"] = [event for event in itertools.islice(events, 600) if event]
        out["ended"] = [next(events, None), process.wait(60)]

        process = child()
        cgroup.add(process.pid)
        events = cgroup.oom_events()
        cgroup.freeze()
        out["frozen"] = [cgroup.frozen, file(cgroup, "cgroup.events").split()]
        cgroup.kill()
        out["killed"] = [process.wait(60), list(events)]
        """,
    )
    assert found["opened"] == [
        ["zero", "full", "kmsg"],
        ["zero", "full"],
        ["zero", "full", "kmsg"],
        ["zero", "full"],
        ["zero", "full", "kmsg"],
        ["zero", "full", "kmsg"],
    ]
    assert found["quiet"] is False
    assert found["events"] == [True]
    assert found["ended"] == [None, -9]
    assert found["frozen"] == [True, ["populated", "1", "frozen", "1"]]
    assert found["killed"] == [-9, []]


# Limits that systemd knows of, and one that it does not.
_LIMITS = """{
    "memory": {"limit": 50 << 20, "swap": 50 << 20, "reservation": 10 << 20}, "pids": {"limit": 33},
    "blockIO": {"weight": 300},
    "cpu": {"shares": 512, "quota": 12345, "period": 50000, "cpus": "0", "mems": "0"},
    "devices": [{"allow": False}], "unified": {"memory.high": "40960000"},
}"""
_FILES = (
    "memory.max",
    "memory.swap.max",
    "memory.low",
    "memory.high",
    "pids.max",
    "cpu.weight",
    "cpuset.cpus",
    "io.weight",
    "cpu.max",
)


def test_leeway_for_criu(machines: Machines) -> None:
    """Limits are lifted for a restore, and hold again before the container runs; what does not fit is an error."""
    found = run(
        machines,
        """
        from runtime.cgroups.leeway import Leeway
        names = ("pids.max", "cpu.max", "memory.high", "memory.max")
        cgroup = create("leeway", None)
        cgroup.apply(parsed(pids={"limit": 1}, cpu={"quota": 1000, "period": 100000}, memory={"limit": 30 << 20}))
        before = [file(cgroup, name) for name in names]
        leeway = Leeway()
        leeway.lift(cgroup.paths)
        out["lifted"] = [file(cgroup, name) for name in names]
        process = child("memory = b'x' * (%d << 20); print('full', flush=True); sys.stdin.readline()" % 25)
        cgroup.add(process.pid)
        process.stdin.write("\\n")
        process.stdin.flush()
        process.stdout.readline()
        leeway.end()
        out["again"] = [file(cgroup, name) for name in names] == before
        leeway.settle()
        leeway.lift(cgroup.paths)
        more = child("memory = b'x' * (%d << 20); print('full', flush=True); sys.stdin.readline()" % 60)
        cgroup.add(more.pid)
        more.stdin.write("\\n")
        more.stdin.flush()
        more.stdout.readline()
        try:
            leeway.end()
        except ContainerError as error:
            out["error"] = str(error)
        out["alive"] = [process.poll(), more.poll()]
        """,
    )
    assert found["lifted"] == ["max", "max 100000", "max", "max"]
    assert found["again"]
    assert "does not fit into its limit of 30720 KiB" in found["error"]
    assert found["alive"] == [None, None]


def test_a_scope_of_systemds(machines: Machines) -> None:
    """Its unit says what the files say, so both are still there after systemd has read its units again."""
    found = run(
        machines,
        f"""
        limits, files, prefix = parsed(**{_LIMITS}), {_FILES!r}, "org.systemd.property."
        process, monitor = child(), child()
        cgroup = create(
            "web", "a-b.slice:pm:web", systemd=True, pid=process.pid, resources=limits,
            annotations={{prefix + "TimeoutStopSec": "7", prefix + "Documentation": "['man:a']"}},
        )
        monitor_cgroup.add(cgroup, monitor.pid)
        out["paths"], out["unit"] = cgroup.paths, cgroup.unit
        out["where"] = [open(f"/proc/{{one.pid}}/cgroup").read().strip() for one in (process, monitor)]
        cgroup.apply(limits)
        out["before"] = {{name: file(cgroup, name) for name in files}} | {{"opened": opened(cgroup)}}
        out["properties"] = shown(
            "pm-web.scope", "MemoryMax", "MemorySwapMax", "MemoryLow", "MemoryHigh", "TasksMax", "CPUWeight",
            "CPUQuotaPerSecUSec", "AllowedCPUs", "Delegate", "TimeoutStopUSec", "Documentation", "Slice",
        )
        command("systemctl", "daemon-reload")
        command("systemctl", "set-property", "--runtime", "pm-web.scope", "TasksMax=33")
        out["after"] = {{name: file(cgroup, name) for name in files}} | {{"opened": opened(cgroup)}}

        # update, by a process that knows the paths and the unit's name only
        cgroup = Cgroup(cgroup.paths, cgroup.unit)
        memory = {{"limit": 60 << 20, "swap": 70 << 20}}
        cgroup.apply(parsed(memory=memory, cpu={{"quota": 20000}}, pids={{"limit": -1}}))
        command("systemctl", "daemon-reload")
        out["updated"] = {{name: file(cgroup, name) for name in files}}

        try:
            Cgroup.create("web", "a-b.slice:pm:web", systemd=True)
        except ContainerError as error:
            out["again"] = type(error).__name__ + " " + str(error)
        out["ours"] = open("/proc/self/cgroup").read().strip()

        # stopping the container's unit leaves its monitor
        command("systemctl", "stop", "pm-web.scope")
        out["stopped"] = [process.wait(60), monitor.poll(), cgroup.pids()]
        monitor.kill()
        monitor.wait()
        cgroup.remove()
        cgroup.remove()
        out["left"] = command("systemctl", "list-units", "--all", "--plain", "--no-legend", "pm-web*")
        places = cgroup.directories() + monitor_cgroup.directories(cgroup)
        out["directories"] = [os.path.exists(path) for path in places]
        """,
    )
    path = "/a.slice/a-b.slice/pm-web.scope"
    assert (found["paths"], found["unit"]) == ({"": f"/sys/fs/cgroup{path}"}, "pm-web.scope")
    assert found["where"] == [f"0::{path}", "0::/a.slice/a-b.slice/pm-web:monitor.scope"]
    limits = {
        "memory.max": str(50 * MIB), "memory.swap.max": "0", "memory.low": str(10 * MIB), "memory.high": "40960000",
        "pids.max": "33", "cpu.weight": "59", "cpuset.cpus": "0", "io.weight": "default 2930", "cpu.max": "12345 50000",
        "opened": ["zero", "full"],
    }  # fmt: skip
    assert found["before"] == limits
    assert found["properties"] == {
        "MemoryMax": str(50 * MIB), "MemorySwapMax": "0", "MemoryLow": str(10 * MIB), "MemoryHigh": "40960000",
        "TasksMax": "33", "CPUWeight": "59", "CPUQuotaPerSecUSec": "250ms", "AllowedCPUs": "0", "Delegate": "yes",
        "TimeoutStopUSec": "7s", "Documentation": "man:a", "Slice": "a-b.slice",
    }  # fmt: skip
    del limits["cpu.max"]
    assert found["after"].pop("cpu.max") in ("12345 50000", "12500 50000")  # systemd keeps whole percents
    assert found["after"] == limits
    del limits["opened"]
    changed = {
        "memory.max": str(60 * MIB),
        "memory.swap.max": str(10 * MIB),
        "pids.max": "max",
        "cpu.max": "20000 50000",
    }
    assert found["updated"] == limits | changed
    assert found["again"].startswith("Conflict systemd has a unit pm-web.scope already")
    assert "pm-web" not in found["ours"]
    assert found["stopped"] == [-15, None, []]
    assert found["left"] == ""
    assert found["directories"] == [False, False]


def test_removing_ends_what_lives_in_a_scope(machines: Machines) -> None:
    found = run(
        machines,
        """
        place = "/sys/fs/cgroup/system.slice/pymigrate-busy.scope/below"
        process = child(f"os.mkdir({place!r})\\nprint(flush=True)\\nsys.stdin.read()")
        cgroup = create("busy", None, systemd=True, pid=process.pid)
        out["unit"] = cgroup.unit
        process.stdin.write("\\n"); process.stdin.flush(); process.stdout.readline()
        cgroup.kill()
        out["status"] = process.wait(60)
        cgroup.remove()
        out["left"] = command("systemctl", "list-units", "--all", "--plain", "--no-legend", "pymigrate*")
        out["there"] = os.path.exists(cgroup.directories()[0])
        """,
    )
    assert found == {"unit": "pymigrate-busy.scope", "status": -9, "left": "", "there": False}


def test_a_slice_of_systemds(machines: Machines) -> None:
    found = run(
        machines,
        """
        limits = parsed(memory={"limit": 50 << 20})
        cgroup = create("pod", "kube.slice:x:kube-pod.slice", systemd=True, resources=limits)
        cgroup.apply(limits)
        out["paths"] = cgroup.paths
        out["limits"] = [file(cgroup, "memory.max"), shown("kube-pod.slice", "MemoryMax")["MemoryMax"]]
        process = child()
        inside = create("in", "kube-pod.slice:x:in", systemd=True, pid=process.pid)
        out["inside"] = inside.paths
        """,
    )
    assert found["paths"] == {"": "/sys/fs/cgroup/kube.slice/kube-pod.slice"}
    assert found["limits"] == [str(50 * MIB)] * 2
    assert found["inside"] == {"": "/sys/fs/cgroup/kube.slice/kube-pod.slice/x-in.scope"}


def test_what_systemd_refuses_is_told(machines: Machines) -> None:
    found = run(
        machines,
        """
        from runtime.cgroups import systemd

        out["errors"] = []
        for refused in (
            lambda: create("bad", None, systemd=True, annotations={"org.systemd.property.NoSuchThing": "1"}),
            lambda: systemd.start(systemd.UnitName.parse("bad", None), 2**22 + 1, None, {}, unified=True),
        ):
            try:
                refused()
            except ContainerError as error:
                out["errors"].append(f"{type(error).__name__} {error}")
        out["left"] = command("systemctl", "list-units", "--all", "--plain", "--no-legend", "pymigrate*")
        """,
    )
    unknown, gone = found["errors"]
    assert unknown.startswith("StartFailed systemd does not start pymigrate-bad.scope: ")
    assert "NoSuchThing" in unknown
    assert gone.startswith("StartFailed systemd does not start pymigrate-bad.scope: ")
    assert found["left"] == ""


def test_the_system_bus_does_as_well(machines: Machines) -> None:
    """Where systemd's own socket is not to be had, as in many containers that may use the bus."""
    found = run(
        machines,
        """
        import runtime.cgroups.dbus as dbus
        dbus._PRIVATE = "/nonexistent"
        process = child()
        cgroup = create("bus", None, systemd=True, pid=process.pid, resources=parsed(pids={"limit": 5}))
        out["where"] = open(f"/proc/{process.pid}/cgroup").read().strip()
        cgroup.apply(parsed(pids={"limit": 6}))
        out["limit"] = shown("pymigrate-bus.scope", "TasksMax")
        dbus._SYSTEM_BUS = "/nonexistent"
        try:
            cgroup.apply(parsed(pids={"limit": 7}))
        except ContainerError as error:
            out["error"] = str(error)
        dbus._SYSTEM_BUS = "/run/dbus/system_bus_socket"
        """,
    )
    assert found["where"] == "0::/system.slice/pymigrate-bus.scope"
    assert found["limit"] == {"TasksMax": "6"}
    assert found["error"].startswith("systemd cannot be reached: /nonexistent: No such file or directory")
