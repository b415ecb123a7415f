"""Real services move to host2 and back, again and again, under the eyes of a client that bears no error."""

import os

import pytest

from tests.support import services
from tests.system.conftest import Lab

ROUNDS = int(os.environ.get("PYMIGRATE_ROUNDS", "5"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("service", services.SERVICES, ids=lambda service: service.name)
def test_there_and_back_again(lab: Lab, service: type[services.Service]) -> None:
    journey = services.travel(service(), lab, ROUNDS)
    assert len(journey.moves) == 2 * ROUNDS
    assert [lab.ids(host) for host in ("host1", "host2")] == [[], []]
    print(services.table([journey]))
