"""The whole demo between two machines: there, back, and two restores of a snapshot."""

from tests.vm.machines import Machines


def test_demo_between_two_machines(pymigrate_on_both: Machines) -> None:
    done = pymigrate_on_both.on("host1", "pymigrate", "demo", "host2", timeout=900)
    print(done.stdout)
    assert done.stdout.splitlines()[-1].endswith("nothing was lost")
    for host in ("host1", "host2"):
        assert pymigrate_on_both.leftovers(host) == ""
        assert pymigrate_on_both.sh(host, "find /var/lib/pymigrate -mindepth 2 -not -path '*/migrations/*'") == ""
