"""Whose files are these? Places at a target that several containers may want, in real moves between two hosts."""

import json

from runtime.spec.default import default_spec
from tests.support.hosts import COUNT, driver
from tests.system.conftest import Lab

BUNDLES = "/var/lib/pymigrate/bundles"
TEST = "/var/lib/pymigrate/test"


def run(lab: Lab, who: str, *, root: str = "", place: str = "web", script: str = COUNT) -> None:
    """Start `web` at host1; its root file system says who it is, and so does a small file that is mounted."""
    linux = default_spec()["linux"] | {"cgroupsPath": f"/pymigrate/{who}"}
    note = {"destination": "/note", "type": "bind", "source": f"{TEST}/{place}/note", "options": ["bind"]}
    lab.run(container=place, script=script, start=False, linux=linux, mounts=[*default_spec()["mounts"], note])
    lab.sh("host1", f"cd {TEST}/{place}; touch rootfs/note; echo {who} | tee note rootfs/who")
    lab.on("host1", "pymigrate", *(("--root", root) if root else ()), "run", "-d", "-b", f"{TEST}/{place}", "web")


def who(lab: Lab, host: str, root: str = "") -> str:
    """What the running `web` reads."""
    rooted = ("--root", root) if root else ()
    seen = set(lab.on(host, "pymigrate", *rooted, "exec", "web", "cat", "/who", "/note").stdout.split())
    assert len(seen) == 1, seen
    return seen.pop()


def test_the_same_id_below_two_roots(lab: Lab) -> None:
    roots = {"alice": "/run/rootA", "bob": "/run/rootB"}
    try:
        for name, root in roots.items():
            run(lab, name, root=root, place=name)
            lab.on("host1", "pymigrate", "--root", root, "move", "web", "host2")
        assert {name: who(lab, "host2", root) for name, root in roots.items()} == {"alice": "alice", "bob": "bob"}
    finally:
        for host in ("host1", "host2"):
            for root in roots.values():
                lab.on(host, "pymigrate", "--root", root, "delete", "--force", "web", check=False)
            lab.sh(host, f"rm -rf {' '.join(roots.values())}")


# A second source of a `web`: it asks for a place, and gives up when another's `web` has moved there meanwhile.
_SLOW = """
import json, subprocess, sys
from migrate.wire import protocol, records
from migrate.journal.journal import new_migration_id
from migrate.wire.peer import connect
config = open("{bundle}/config.json").read()
with connect("host2", root="/run/opencontainer/containers") as peer:
    call = protocol.OpenBundle(
        new_migration_id(), "host3", "web", "2026-01-01T00:00:00.000000000Z", config, "0" * 64, ["{bundle}"], [])
    place = peer.call(call)
    done = subprocess.run(["pymigrate", "move", "web", "host2"], stdin=subprocess.DEVNULL)
    peer.call(protocol.Abort())
print(records.dumps(place).decode())
sys.exit(done.returncode)
"""


def test_two_sources_move_the_same_id_and_the_slow_one_fails(lab: Lab) -> None:
    run(lab, "alice")
    slow = lab.on("host1", lab.python, "-c", _SLOW.format(bundle=f"{TEST}/web"))
    assert who(lab, "host2") == "alice"
    taken = lab.state("host2")["bundle"]
    assert json.loads(slow.stdout.splitlines()[-1])["bundle"] != taken
    assert lab.sh("host2", f"ls {BUNDLES}").split() == [taken.rpartition("/")[2]]


def test_recover_does_not_empty_the_root_of_a_later_container(lab: Lab) -> None:
    """The first one's coordinator died after COMMITTED; another `web` has come to the target since."""
    run(lab, "alice")
    kill = driver("end-source", before="os.kill(os.getpid(), 9)")
    assert lab.on("host1", lab.python, "-c", kill, check=False).returncode == 137
    lab.on("host1", "pymigrate", "delete", "--force", "web")
    run(lab, "bob", place="other")
    lab.on("host1", "pymigrate", "move", "web", "host2")
    assert who(lab, "host2") == "bob"
    lab.on("host1", "pymigrate", "recover", "web", check=False)
    assert who(lab, "host2") == "bob"
    assert lab.ids("host2") == ["web"]


def test_what_a_failed_move_has_sent_is_not_sent_again(lab: Lab) -> None:
    """Nor taken as whole without a look at its contents: what was sent may be damaged."""
    lab.run(start=False)
    lab.sh("host1", f"head -c 20000000 /dev/urandom > {TEST}/web/rootfs/big; cd {TEST}/web/rootfs; cat big > damaged")
    lab.on("host1", "pymigrate", "run", "-d", "-b", f"{TEST}/web", "web")
    lab.wait_count("host1", 1)
    fail = driver("send-ahead", after="raise OSError('test')")
    assert lab.on("host1", lab.python, "-c", fail, check=False).returncode == 10
    place = f"{BUNDLES}/web"
    assert place in lab.on("host2", "pymigrate", "migrations").stdout.splitlines()[-1]
    damage = "dd if=/dev/zero of=damaged bs=1000 count=1 conv=notrunc; touch -r big.time damaged"
    lab.sh("host2", f"cd {place}/rootfs; touch -r damaged big.time; {damage}; rm big.time")
    report = json.loads(lab.on("host1", "pymigrate", "--json", "move", "web", "host2").stdout.splitlines()[-1])
    assert report["bytes_sent"] < 5_000_000, report
    root = lab.state("host2")["rootfs"]
    assert root == f"{place}/rootfs"
    lab.sh("host2", f"cmp {root}/big {root}/damaged")
    lab.on("host2", "pymigrate", "delete", "--force", "web")
    assert lab.on("host2", "pymigrate", "migrations", "--clean").stdout == "", "the container has run from it"
    lab.sh("host2", f"test -e {root}/big")
