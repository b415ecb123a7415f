"""Where the images of a move are: in memory, on the disk only while the outcome is not known, and gone after it."""

import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

from runtime.spec.default import default_spec
from tests.support.hosts import COUNT, KILL_AGENT, NO_MEMORY, driver, in_agent
from tests.system.conftest import Lab
from tests.system.move.test_move import assert_soon_clean, assert_still_here

# In no file of the bundle: the container makes it of two halves.
SECRET = "s3cret-in-memory"
KEEPS_A_SECRET = f"x=s3cret; x=$x-in-memory; {COUNT}"

_HOLD = (
    f"KILL_AGENT = {KILL_AGENT!r}\n"
    + """
def hold():
    print("held", flush=True)
    if sys.stdin.readline() == "die\\n":
        os.kill(os.getpid(), 9)
def at_target(script):
    subprocess.run(["ssh", "host2", script], check=True, stdin=subprocess.DEVNULL)
def kill_agent():
    at_target(KILL_AGENT)
def kill_keeper():
    at_target("kill -9 $(sed 's/[^0-9]*\\\\([0-9]*\\\\).*/\\\\1/' /run/pymigrate/images/memory/*/keeper.json)")
def wait_synced():
    wait = "until test -e /var/lib/pymigrate/incoming/*/manifest.json; do :; done"
    at_target(f"timeout 60 sh -c '{wait}; until ! test -e /run/pymigrate/images/memory; do :; done'")
"""
)
PATIENT = in_agent("from migrate.target import image_keeper\nimage_keeper.VERDICT_PATIENCE = 3600.0")
PREPARED = "stop-and-copy"
GIVEN_UP = "end-source"


def moving(lab: Lab, where: str, *, agent: str = "", **do: str) -> "subprocess.Popen[str]":
    """A move that does something at one of its points; see `driver`."""
    program = agent + driver(where, body=_HOLD, **do)
    return lab.start("host1", lab.python, "-c", program, stdin=subprocess.PIPE)


def held(lab: Lab, where: str = PREPARED, *, agent: str = "") -> "subprocess.Popen[str]":
    """A move that waits for a line at the end of a point."""
    running = moving(lab, where, agent=agent, after="hold()")
    assert running.stdout is not None
    for line in running.stdout:
        if line == "held\n":
            return running
    raise AssertionError(running.communicate())


def ended(running: "subprocess.Popen[str]", line: str | None = None) -> tuple[int, dict[str, Any]]:
    out, errors = running.communicate(line, timeout=90)
    assert "Traceback" not in errors, errors
    lines = out.splitlines()
    return running.returncode, json.loads(lines[-1]) if lines else {}


def wait_until(what: Callable[[], bool], patience: float = 60.0) -> None:
    deadline = time.monotonic() + patience
    while not what():
        assert time.monotonic() < deadline


def places(lab: Lab) -> list[str]:
    """Where images are at the target: memory, disk."""
    return ["memory" if path.startswith("/run") else "disk" for path in lab.images("host2")]


def with_secret(lab: Lab, directory: str) -> list[str]:
    return lab.sh("host2", f"grep -rlaF {SECRET} {directory}", check=False).split()


def described(lab: Lab) -> list[dict[str, Any]]:
    """The images that `migrations` shows at the target, each with its move's `workload`."""
    lines = lab.on("host2", "pymigrate", "--json", "migrations").stdout.splitlines()
    moves = [json.loads(line) for line in lines]
    return [image | {"workload": move["workload"]} for move in moves for image in move["images"]]


def test_memory_is_not_on_the_disk_before_the_move_is_in_doubt(lab: Lab) -> None:
    """The coordinator dies at PREPARED: images and journal are on the disk then, complete, until somebody decides."""
    lab.run(script=KEEPS_A_SECRET)
    start = lab.wait_count("host1", 1)
    running = held(lab, agent=PATIENT)
    assert places(lab) == ["memory"]
    assert with_secret(lab, "/var/lib/pymigrate") == []
    assert with_secret(lab, "/run/pymigrate/images") != []
    options = lab.sh("host2", "grep ' /run/pymigrate/images/memory ' /proc/self/mountinfo").split()
    assert {"nosuid", "nodev", "noexec"} <= set(options[5].split(",")), options
    assert options[6] == "-", "not private"
    lab.sh("host2", "cd /run/pymigrate/images/memory; mkdir -p /var/lib/pymigrate/incoming/$(echo 2*).new")
    assert [image["in_use"] for image in described(lab)] == [True, True]
    lab.on("host2", "pymigrate", "migrations", "--clean", "--force")
    assert places(lab) == ["memory", "disk"], "images in use were removed"
    assert ended(running, "die\n")[0] == 137
    wait_until(lambda: places(lab) == ["disk"] and lab.sh("host2", "ls -d /run/pymigrate/images", check=False) == "")
    [path] = lab.images("host2")
    assert with_secret(lab, path) != []
    verify = "from migrate.target.images import ReceivedImages; ReceivedImages.existing({!r}).verify()"
    lab.on("host2", lab.python, "-c", verify.format(path.rsplit("/", 1)[1]))
    [image] = described(lab)
    assert (image["place"], image["may_be_last_copy"], image["in_use"]) == ("disk", True, False)
    assert image["bytes"] > 100_000
    assert image["workload"] == "UNKNOWN"
    refused = lab.on("host2", "pymigrate", "migrations", "--clean", check=False)
    assert (refused.returncode, places(lab)) == (5, ["disk"]), refused.stderr
    assert "may be the last copy of a container" in refused.stderr
    assert "pymigrate recover web" in refused.stderr
    forced = lab.on("host2", "pymigrate", "migrations", "--clean", "--force")
    assert "may have been the last copy" in forced.stderr
    assert places(lab) == []
    lab.wait_count("host1", start)


def test_images_outlive_their_agent(lab: Lab) -> None:
    """It is killed when the source has given the container up: the keeper takes them to the disk."""
    lab.run()
    start = lab.wait_count("host1", 1)
    code, event = ended(moving(lab, GIVEN_UP, agent=PATIENT, after="kill_agent(); wait_synced()"))
    assert (code, event.get("workload")) == (0, "TARGET"), event
    lab.wait_count("host2", start)
    assert (lab.ids("host1"), places(lab)) == ([], [])


def test_images_outlive_agent_and_keeper(lab: Lab) -> None:
    """They are still in memory: the next agent finds them there."""
    lab.run()
    start = lab.wait_count("host1", 1)
    code, event = ended(moving(lab, GIVEN_UP, after="kill_keeper(); kill_agent()"))
    assert (code, event.get("workload")) == (0, "TARGET"), event
    lab.wait_count("host2", start)
    assert (lab.ids("host1"), places(lab)) == ([], [])


def test_images_are_synced_when_the_source_is_silent(lab: Lab) -> None:
    """It goes on after all: its container has lost nothing, and neither place keeps images."""
    lab.run(script=KEEPS_A_SECRET)
    start = lab.wait_count("host1", 1)
    running = held(lab)
    synced = "test -e /var/lib/pymigrate/incoming/2*/manifest.json && echo yes"
    wait_until(lambda: lab.sh("host2", synced, check=False) == "yes\n")
    code, event = ended(running, "\n")
    assert (code, event.get("workload")) == (0, "TARGET"), event
    lab.wait_count("host2", start)
    assert places(lab) == []
    assert with_secret(lab, "/var/lib/pymigrate") == []


def test_a_copy_to_the_disk_does_not_delay_the_resume(lab: Lab) -> None:
    """The keeper is in the middle of it, and waits for the disk."""
    lab.run()
    start = lab.wait_count("host1", 1)
    running = held(lab, agent=PATIENT)
    lab.sh(
        "host2",
        "cd /run/pymigrate/images/memory/2*; kill -STOP $(sed 's/[^0-9]*\\([0-9]*\\).*/\\1/' keeper.json); "
        "d=/var/lib/pymigrate/incoming/${PWD##*/}.new; mkdir -p $d; echo half > $d/pages-1.img",
    )
    code, event = ended(running, "\n")
    assert (code, event.get("workload")) == (0, "TARGET"), event
    lab.wait_count("host2", start)
    assert places(lab) == []


def test_images_of_an_agent_that_died_before_prepared_are_removed(lab: Lab) -> None:
    """Nobody tells: its keeper notices. Without it, `migrations` shows them, and --clean removes them."""
    lab.run()
    start = lab.wait_count("host1", 1)
    where = "send-images"
    die = "; os.kill(os.getpid(), 9)"
    assert ended(moving(lab, where, after="kill_agent()" + die))[0] == 137
    wait_until(lambda: lab.sh("host2", "ls -d /run/pymigrate/images", check=False) == "")
    lab.on("host2", "pymigrate", "delete", "--force", "web")
    assert ended(moving(lab, where, after="kill_keeper(); kill_agent()" + die))[0] == 137
    assert [(image["place"], image["may_be_last_copy"]) for image in described(lab)] == [("memory", False)]
    assert "not needed" in lab.on("host2", "pymigrate", "migrations").stdout
    lab.on("host2", "pymigrate", "migrations", "--clean", "--id", "other")
    assert places(lab) == ["memory"]
    lab.on("host2", "pymigrate", "migrations", "--clean", "--id", "web")
    assert places(lab) == []
    lab.wait_count("host1", start)


def test_a_later_agent_takes_care_of_images_in_memory(lab: Lab) -> None:
    """Agent and keeper of a move are dead, and another container comes: what may be a last copy goes to the disk."""
    lab.run()
    lab.run(container="other")
    code, event = ended(moving(lab, GIVEN_UP, after="kill_keeper(); kill_agent(); os.kill(os.getpid(), 9)"))
    assert (code, places(lab)) == (137, ["memory"]), event
    lab.on("host1", "pymigrate", "move", "other", "host2")
    wait_until(lambda: places(lab) == ["disk"])
    lab.on("host1", "pymigrate", "recover", "web")
    assert (sorted(lab.ids("host2")), places(lab)) == (["other", "web"], [])


def test_a_target_without_memory_to_spare_says_so(lab: Lab) -> None:
    """The images go to its disk, as they did before; they do not stay."""
    lab.run(script=KEEPS_A_SECRET)
    start = lab.wait_count("host1", 1)
    there = "at_target('ls /var/lib/pymigrate/incoming/2*/pages-*.img >&2')"
    out, _ = moving(lab, PREPARED, agent=NO_MEMORY, after=there).communicate(timeout=90)
    events = [json.loads(line) for line in out.splitlines()]
    [warning] = [event["message"] for event in events if event["event"] == "warning"]
    assert "its memory is on the disk of host2" in warning
    assert "0 MiB of memory are free for images" in warning
    lab.wait_count("host2", start)
    assert with_secret(lab, "/var/lib/pymigrate") == []
    assert places(lab) == []


def test_a_kernel_whose_tmpfs_maps_no_ids(lab: Lab) -> None:
    """As before Linux 6.3: the images are given to the root of the container's user namespace."""
    old = """
from runtime.linux import syscalls
from runtime.linux.mount_flags import ATTR_IDMAP
def refusing(*args, original=syscalls.mount_setattr, **options):
    if options["set"] & ATTR_IDMAP:
        raise OSError(22, "Invalid argument")
    original(*args, **options)
syscalls.mount_setattr = refusing
"""
    place, ids = "/var/lib/pymigrate/test/web", [{"containerID": 0, "hostID": 100000, "size": 65536}]
    linux = default_spec()["linux"]
    linux = linux | {"namespaces": [*linux["namespaces"], {"type": "user"}]}
    lab.run(linux=linux | {"uidMappings": ids, "gidMappings": ids, "resources": {}}, start=False)
    lab.sh("host1", f"chown -R 100000:100000 {place}/rootfs")
    lab.on("host1", "pymigrate", "run", "-d", "-b", place, "web")
    start = lab.wait_count("host1", 1)
    owned = "at_target('find /run/pymigrate/images/memory/2*/pages-*.img -user 100000 -perm 0640 | grep -q .')"
    code, event = ended(moving(lab, PREPARED, agent=in_agent(old), after=owned))
    assert (code, event.get("workload")) == (0, "TARGET"), event
    lab.wait_count("host2", start)
    assert places(lab) == []


def test_memory_that_fills_up_rolls_back(lab: Lab) -> None:
    """The container was measured before it grew."""
    lab.run(script=f"x=$(head -c 5000000 /dev/urandom | base64); {COUNT}")
    start = lab.wait_count("host1", 1)
    small = in_agent("from migrate.target import image_places\nimage_places.room = lambda **_: 1 << 20")
    measured = "from migrate.preflight import processes as process_scan\nprocess_scan.memory_bytes = lambda pid: 0\n"
    running = lab.start(
        "host1", lab.python, "-c", small + measured + driver(PREPARED), stdin=subprocess.DEVNULL
    )  # fmt: skip
    code, event = ended(running)
    assert (code, event["workload"]) == (10, "SOURCE"), event
    assert "no room at host2 for /run/pymigrate/images/memory/" in event["message"], event
    assert "try again" in event["remedy"]
    assert_still_here(lab, start)
    assert_soon_clean(lab)


def test_images_of_an_earlier_version_are_used(lab: Lab) -> None:
    """On the disk, without a manifest; journals without checksums."""
    lab.run()
    start = lab.wait_count("host1", 1)
    assert ended(moving(lab, GIVEN_UP, after="kill_agent(); wait_synced(); os.kill(os.getpid(), 9)"))[0] == 137
    lab.sh("host2", "rm /var/lib/pymigrate/incoming/*/*.json")
    for host in ("host1", "host2"):
        strip = 's/"format": 2, //; s/, "crc": "[0-9a-f]*"}$/}/'
        lab.sh(host, f"sed -i '{strip}' /var/lib/pymigrate/migrations/*.jsonl")
    lab.on("host1", "pymigrate", "recover", "web")
    lab.wait_count("host2", start)
    assert (lab.phases("host1"), places(lab)) == (["resumed"], [])


def test_a_damaged_journal_is_named_and_not_passed_over(lab: Lab) -> None:
    """Its line may be the decision: the container does not move again before somebody has looked."""
    lab.run()
    start = lab.wait_count("host1", 1)
    assert ended(moving(lab, GIVEN_UP, before="os.kill(os.getpid(), 9)"))[0] == 137
    path = lab.sh("host1", "ls /var/lib/pymigrate/migrations/*.jsonl").strip()
    lab.sh("host1", f'sed -i \'s/"committed"/"cammitted"/\' {path}')
    words = f"{path}: line 6 has a wrong checksum"
    for verb in (["move", "web", "host2"], ["recover", "web"]):
        done = lab.on("host1", "pymigrate", *verb, check=False)
        assert (done.returncode, words in done.stderr) == (1, True), done.stderr
    shown = lab.on("host1", "pymigrate", "--json", "migrations")
    assert words in shown.stderr
    move = json.loads(shown.stdout)
    assert (move["id"], move["damage"]["line"], move["workload"]) == ("web", 6, "UNKNOWN")
    lab.wait_count("host1", start)
    lab.sh("host1", f"mv {path} /tmp/damaged-journal-$$; rm /tmp/damaged-journal-$$")
    lab.on("host1", "pymigrate", "move", "web", "host2", check=False)
