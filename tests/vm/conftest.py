"""Two virtual machines for the whole session; $DEBIAN chooses what runs in them (13, or 12)."""

import os
from collections.abc import Iterator

import pytest

from tests.vm import images
from tests.vm.machines import AGENT, Machines


@pytest.fixture(scope="session")
def machines_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with images.built(os.environ.get("DEBIAN", "13")) as made:
        machines = Machines(made, tmp_path_factory.mktemp("vm"))
    try:
        machines.up()
        yield machines
    finally:
        machines.down()


@pytest.fixture(scope="module")
def installed_on_both(machines_session: Machines) -> Iterator[None]:
    """host2 has what host1 has, for moves that start there; it is bare again afterwards."""
    machines_session.up()
    pycriu = "/usr/lib/python3/dist-packages/pycriu"
    copy = f"rsync -a /opt/pymigrate host2:/opt/ && rsync -a {pycriu} host2:/opt/pymigrate/lib/"
    machines_session.sh("host1", copy)
    machines_session.sh("host2", "ln -s /opt/pymigrate/venv/bin/pymigrate /usr/local/bin/ && sync")
    yield
    machines_session.sh("host2", "rm -rf /opt/pymigrate /usr/local/bin/pymigrate")


@pytest.fixture
def machines(machines_session: Machines) -> Iterator[Machines]:
    """Both machines, on, without containers and what moves leave for the next one."""
    yield machines_session
    machines_session.up()
    clean = "for i in $(%s list -q); do %s delete -f $i; done; rm -rf /var/lib/pymigrate/* /run/opencontainer"
    machines_session.sh("host1", clean % ("pymigrate", "pymigrate"))
    machines_session.sh("host2", f"[ ! -e {AGENT} ] || {{ {clean % ((f'python3 {AGENT}',) * 2)}; }}")


@pytest.fixture
def pymigrate_on_both(machines: Machines, installed_on_both: None) -> Machines:
    return machines
