"""CRIU with Debian's own kernel, which can track dirty pages: that cannot be tried on a machine whose kernel cannot."""

import json

from tests.system.checkpoint.test_killed_criu import KILL, killing
from tests.vm import connected
from tests.vm.machines import Machines
from tests.workloads import bundle

IMAGES = "/var/lib/pymigrate/test/images"
# Two pre-dumps and a dump of a container that holds memory, each a child of the one before; pages written by each.
_ROUNDS = """
import dataclasses, json, os, pathlib
from criu_rpc.client import Criu
from runtime.checkpoint import options as criu_options
from runtime.spec import config as spec_config
from runtime.state.store import Store
state = Store(pathlib.Path("/run/opencontainer/containers")).load("web")
criu, top, sizes = Criu(), pathlib.Path("/root/rounds"), []
for number in (1, 2, 3):
    images = top / str(number)
    images.mkdir(parents=True)
    fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    options = criu_options.dump_options(
        state, spec_config.load(pathlib.Path(state.bundle)), images_dir_fd=fd, work_dir_fd=fd, leave_running=number == 3
    )
    parent = f"../{number - 1}" if number > 1 else None
    options = dataclasses.replace(options, track_mem=True, parent_img=parent)
    if number < 3:
        criu.pre_dump(options, timeout=60)
    else:
        with criu.dump(options, timeout=60) as session:
            session.finish()
    sizes.append(sum(path.stat().st_size for path in images.glob("pages-*.img")))
print(json.dumps({"mem_track": criu.features().mem_track, "sizes": sizes}))
"""


def test_second_pre_dump_holds_only_what_has_changed(machines: Machines) -> None:
    machines.run(
        script="x=$(head -c 6000000 /dev/urandom | base64); i=0; while :; do i=$((i+1)); echo $i; sleep 1; done"
    )
    before = machines.wait_count("host1", 1)
    try:
        found = json.loads(machines.on("host1", machines.python, "-c", _ROUNDS).stdout)
    finally:
        machines.sh("host1", "rm -rf /root/rounds")
    assert found["mem_track"]
    first, second, last = found["sizes"]
    assert first > 6_000_000
    assert max(second, last) < first / 4, found
    machines.wait_count("host1", before)


def test_connections_go_on_after_a_pre_dump(pymigrate_on_both: Machines) -> None:
    """As engines order it: memory ahead, and what has changed since in a second checkpoint. Restored elsewhere."""
    machines = pymigrate_on_both
    copy = f"rsync -a --delete --mkpath {bundle.PLACE} {IMAGES} host2:/var/lib/pymigrate/test/"
    with connected.client(machines) as client:
        bundle.start(machines, connected.config())
        client.wait_connected()
        before = machines.wait_count("host1", 3)
        machines.on("host1", "pymigrate", "checkpoint", "--pre-dump", "--image-path", f"{IMAGES}/1", "web")
        machines.sh("host1", copy)
        assert machines.wait_count("host1", before) > before
        images = ("--image-path", f"{IMAGES}/2", "--tcp-established")
        machines.on("host1", "pymigrate", "checkpoint", "--parent-path", "../1", *images, "web")
        machines.sh("host1", copy)
        machines.on("host2", "pymigrate", "restore", "-d", "-b", bundle.PLACE, *images, "web")
        sizes = [
            sum(map(int, machines.sh("host1", f"stat -c %s {IMAGES}/{number}/pages-*.img").split()))
            for number in (1, 2)
        ]
        print("rounds:", sizes)
        assert sizes[0] > connected.HELD > sizes[1], sizes
        connected.assert_in_order(machines, "host2")
    assert connected.interfaces(machines, "host1") == []


# For what is moved with it.
_ALLOW = """
def moved(argv, original=main):
    return original([*argv, "--allow", "writable-rootfs"])
main = moved
"""


def test_a_move_whose_criu_is_killed(machines: Machines) -> None:
    """In a scope of systemd's and frozen by cgroup version 2; moved all the same in the end."""
    config = connected.config()
    config["linux"]["cgroupsPath"] = "system.slice:pymigrate:web"
    with connected.client(machines) as client:
        bundle.start(machines, config, "--systemd-cgroup")
        client.wait_connected()
        pid = machines.state("host1")["pid"]
        for point in ("frozen", "held"):
            done = machines.on("host1", machines.python, "-c", killing(point, KILL, body=_ALLOW), check=False)
            event = json.loads(done.stdout.splitlines()[-1])
            assert (done.returncode, event["workload"]) == (10, "SOURCE"), (point, event, done.stderr)
            assert "as before: criu was killed by SIGKILL" in event["message"], (point, event)
            look = f"nsenter -t {pid} -n nft list tables; cd /sys/fs/cgroup/system.slice/pymigrate-web.scope; "
            look += f"cat cgroup.freeze; grep frozen cgroup.events; grep TracerPid /proc/{pid}/status"
            assert machines.sh("host1", look).split() == ["0", "frozen", "0", "TracerPid:", "0"], point
            machines.wait_count("host1", machines.count("host1") + 10)
        machines.on("host1", "pymigrate", "move", "--allow", "writable-rootfs", "web", "host2")
        connected.assert_in_order(machines, "host2")
