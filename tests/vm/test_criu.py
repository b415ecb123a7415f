"""CRIU with Debian's own kernel, which can track dirty pages: that cannot be tried on a machine whose kernel cannot."""

import json

from tests.vm.machines import Machines

# Two pre-dumps and a dump of a container that holds memory, each a child of the one before; pages written by each.
_ROUNDS = """
import dataclasses, json, os, pathlib
from criu_rpc.client import Criu
from runtime import checkpoint, spec
from runtime.state import Store
state = Store(pathlib.Path("/run/opencontainer/containers")).load("web")
criu, top, sizes = Criu(), pathlib.Path("/root/rounds"), []
for number in (1, 2, 3):
    images = top / str(number)
    images.mkdir(parents=True)
    fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    options = checkpoint.dump_options(
        state, spec.load(pathlib.Path(state.bundle)), images_dir_fd=fd, work_dir_fd=fd, leave_running=number == 3
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
