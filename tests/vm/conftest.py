"""Two virtual machines for the whole session; $DEBIAN chooses what runs in them (13, or 12)."""

import os
import shlex
from collections.abc import Iterator

import pytest

from tests.conftest import FAILED
from tests.vm import images
from tests.vm.machines import BARE, Machines

# Without effect where the command is not there: nothing has come to a bare host2 then.
_CLEAN = "for i in $({0} list -q); do {0} delete -f $i; done; rm -rf /var/lib/pymigrate/* /run/opencontainer; sync"


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
    """host2 has what host1 has, for moves that start there; it is bare again afterwards, all of it put aside."""
    machines_session.up()
    pycriu = "/usr/lib/python3/dist-packages/pycriu"
    ours = "rsync -a --exclude=/pymigrate/sealed /opt/pymigrate host2:/opt/"  # a mount of /usr/bin
    copy = f"{ours} && rsync -a {pycriu} host2:/opt/pymigrate/lib/"
    try:
        machines_session.sh("host2", "[ ! -e /opt/aside ] || mv -T /opt/aside /opt/pymigrate")
        machines_session.sh("host1", copy)
        machines_session.sh("host2", "ln -s /opt/pymigrate/venv/bin/pymigrate /usr/local/bin/ && sync")
        machines_session.pymigrate["host2"] = machines_session.pymigrate["host1"]
        yield
    finally:
        machines_session.pymigrate["host2"] = BARE
        machines_session.sh("host2", "rm -f /usr/local/bin/pymigrate; mv -T /opt/pymigrate /opt/aside; sync")


@pytest.fixture
def machines(machines_session: Machines, request: pytest.FixtureRequest) -> Iterator[Machines]:
    """Both machines, on, without containers and what moves leave for the next one.

    What a failed test has left running is not known: they lose their power then.
    """
    yield machines_session
    if FAILED in request.node.stash:
        machines_session.power_off()
    machines_session.up()
    cleaning = [
        machines_session.start(host, "sh", "-c", _CLEAN.format(shlex.join(command)))
        for host, command in machines_session.pymigrate.items()
    ]
    for process in cleaning:  # both at once: each has a processor of its own
        said = process.communicate(timeout=machines_session.timeout)
        assert process.returncode == 0, said


@pytest.fixture
def pymigrate_on_both(machines: Machines, installed_on_both: None) -> Machines:
    return machines
