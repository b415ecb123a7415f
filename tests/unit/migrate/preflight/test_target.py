"""The rules about a target, from facts; and which rules can be lifted."""

from typing import Any

import pytest

from migrate.errors import Blocked, ProtocolError, UsageError
from migrate.preflight.rules import RULES, Blocker, check_allowed, raise_blocked
from migrate.preflight.target import target_blockers
from migrate.wire import records
from migrate.wire.questions import FactsQuery, HostFacts
from runtime.state.record import State

SOURCE = HostFacts(
    name="host1", machine="x86_64", bits=64, criu="4.2.1", images_free=1 << 40, memory_free=1 << 40, rsync=True
)
STATE = State(id="web", bundle="/b", rootfs="/b/rootfs", created="", log_path="")


def rules(**changes: Any) -> list[str]:
    target = SOURCE.replace(name="host2", **changes)
    joined = {"network": "/run/netns/web"}
    found = target_blockers(SOURCE, target, STATE, 1 << 30, send_rootfs=True, memory=1 << 28, joined=joined)
    return [blocker.rule for blocker in found]


def test_a_twin_is_a_fit_target() -> None:
    assert rules() == []


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"id_in_use": True}, "id-in-use"),
        ({"machine": "aarch64"}, "architecture"),
        ({"bits": 32}, "architecture"),
        ({"criu": ""}, "criu"),
        ({"criu_problem": "broken"}, "criu"),
        ({"criu": "4.2"}, "criu-version"),
        ({"criu": "4.1.1"}, "criu-protocol"),
        ({"cpu_problem": "no avx512"}, "cpu"),
        ({"missing": ("/srv/data",)}, "missing-source"),
        ({"missing": ("/run/netns/web",)}, "joined-namespace"),
        ({"images_free": 1 << 20}, "no-space"),
        ({"memory_free": (1 << 28) - 1}, "no-memory"),
        ({"rsync": False}, "rsync"),
    ],
)
def test_each_difference_is_found(changes: dict[str, Any], rule: str) -> None:
    assert rules(**changes) == [rule]


def test_all_are_listed_at_once() -> None:
    assert rules(id_in_use=True, machine="aarch64", images_free=0) == ["id-in-use", "architecture", "no-space"]


def test_a_target_that_is_this_host_is_suspected() -> None:
    """`delete the container there` would be the wrong thing to do then."""
    here, there = (
        target_blockers(SOURCE, SOURCE.replace(name=name, id_in_use=True), STATE, 0, send_rootfs=False)
        for name in (SOURCE.name, "host9")
    )
    assert [found.problem for found in here] == [
        "exists already; the target has the same name as this host: is it this host?"
    ]
    assert [found.problem for found in there] == ["exists already"]


def test_newer_criu_is_fine() -> None:
    assert rules(criu="5.0") == []


def test_allow_lifts_only_what_is_safe() -> None:
    blockers = [Blocker("cpu", "host2", "x"), Blocker("id-in-use", "host2", "y")]
    with pytest.raises(Blocked) as caught:
        raise_blocked(STATE, blockers, frozenset({"cpu"}), "host2")
    assert [problem[0] for problem in caught.value.problems] == ["id-in-use"]
    raise_blocked(STATE, blockers[:1], frozenset({"cpu"}), "host2")
    with pytest.raises(UsageError, match="unknown rule"):
        check_allowed({"nonsense"})
    with pytest.raises(UsageError, match="cannot be lifted"):
        check_allowed({"id-in-use"})


def test_every_rule_says_what_to_do() -> None:
    assert all(rule.remedy for rule in RULES.values())


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"id": 1}, records.encode(FactsQuery()) | {"more": 1}, records.encode(FactsQuery()) | {"paths": "x"},
     records.encode(FactsQuery()) | {"paths": ["relative"]}, records.encode(FactsQuery()) | {"paths": [1]}],
)  # fmt: skip
def test_queries_from_outside_are_checked(value: Any) -> None:
    with pytest.raises(ProtocolError):
        records.decode(FactsQuery, value, "a query")


def test_facts_survive_the_wire() -> None:
    facts = SOURCE.replace(missing=("/a",), cpuinfo="eA==")
    assert records.decode(HostFacts, records.encode(facts), "facts") == facts
    with pytest.raises(ProtocolError):
        records.decode(HostFacts, records.encode(facts) | {"bits": "64"}, "facts")
