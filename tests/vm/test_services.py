"""PostgreSQL under a user of its own: that takes a CRIU with all of root's capabilities."""

from typing import Any

from tests.support import services
from tests.support.hosts import ROOTFS
from tests.vm.machines import Machines


class Postgres(services.Postgres):
    """Both machines have the programs; what moves is the data. A client at host1."""

    address = "10.77.0.51"
    owner = 1000
    rootfs = ROOTFS
    client_host = "host1"
    clients = 2
    scale = 1
    rate = 20
    # Without KVM a few MiB a second go over: of memory and of files.
    initdb = "--wal-segsize 1"
    settings = "-c shared_buffers=4MB -c min_wal_size=2MB -c max_wal_size=8MB -c full_page_writes=off -c fsync=off"

    def configure(self, config: dict[str, Any]) -> None:
        config["root"]["readonly"] = False
        config["process"]["user"] = {"uid": self.owner, "gid": self.owner}
        for place in ("/lib", "/usr"):
            source = f"{services.ROOTFS}{place}"
            config["mounts"].append({"destination": place, "source": source, "type": "bind", "options": ["bind", "ro"]})


def test_postgres_there_and_back(pymigrate_on_both: Machines) -> None:
    """No transaction fails, nothing is lost of those that were done."""
    hosts, service = pymigrate_on_both, Postgres()
    service.start(hosts, "host1")
    with service.client(hosts) as client:
        for source, target in (("host1", "host2"), ("host2", "host1")):
            hosts.move(source, target, "--allow", "writable-rootfs", container=service.name)
            users = hosts.on(target, "pymigrate", "exec", service.name, "stat", "-c", "%u", "/proc/1", "/srv").stdout
            assert users.split() == [str(service.owner)] * 2
        print(service.check(hosts, "host1", client))
