"""A target that lies: whatever it sends, the source's memory stays bounded, and the move ends with one sentence."""

import json
from typing import Any

import pytest

from tests.support.hosts import in_agent
from tests.system.conftest import Lab

LIMIT = 1 << 30  # bytes of address space for a source, which takes 700 MiB otherwise: each thread has 72 of it

# `pymigrate move web host2`; when the target has made room for the bundle the source waits for `wait` seconds, or until
# it has given the target up.
MOVE = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
from migrate.cli import main
from migrate.source import seeding
original = seeding.Seeding.send_ahead
def ahead(self, trees):
    end = time.monotonic() + {wait}
    while self._peer._lost is None and time.monotonic() < end:
        time.sleep(0.01)
    original(self, trees)
seeding.Seeding.send_ahead = ahead
code = main(["--json", "move", "web", "host2"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""
# Its agent does `lie` when it is about to answer: `ask` is a word for what it was asked for.
AGENT = """
import json
from migrate.target.agent import Agent, FrameType
original = Agent._write
KEYS = {{"host": "Hello", "machine": "Facts", "rootfs": "OpenBundle", "tmpfs": "Prepare", "pid": "Restore"}}
def write(self, kind, payload):
    answer = json.loads(payload) if kind is FrameType.REPLY else {{}}
    ask = next((KEYS[key] for key in answer if key in KEYS), "")
    send = lambda kind, value: original(self, kind, json.dumps(value).encode())
{lie}
    original(self, kind, payload)
Agent._write = write
"""


def lying_move(lab: Lab, lie: str, *, wait: float = 0) -> tuple[int, dict[str, Any], int]:
    """Exit status and last event of a move to a target that lies, and the source's peak of memory in bytes."""
    text = AGENT.format(lie="\n".join(f"    {line}" for line in lie.splitlines()))
    done = lab.on("host1", lab.python, "-c", in_agent(text) + MOVE.format(limit=LIMIT, wait=wait), check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), int(done.stderr.split()[-1]) << 10


def assert_nothing_lost(lab: Lab, before: int) -> None:
    assert lab.ids("host1") == ["web"]
    lab.wait_count("host1", before)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ("if ask == 'OpenBundle':\n"
         "  original(self, kind, payload)\n"
         "  while True: send(kind, {'x': 'x' * 100_000})", "an answer came to a call that was not made"),
        ("while ask == 'Hello': original(self, FrameType.PULSE, b'1')", "a flood of PULSE frames"),
        ("if ask == 'Hello': original(self, FrameType.PULSE, b'1' * 100)", "over the limit"),
        ("if ask == 'Facts': original(self, kind, b'[' + b'[],' * (1 << 21) + b'[]]')", "over the limit"),
        ("if ask == 'Facts': original(self, kind, b'[' * 500_000)", "not JSON"),
    ],
    ids=["replies", "pulses", "long-pulse", "long-reply", "deep-reply"],
)  # fmt: skip
def test_a_flood_ends_the_move(lab: Lab, lie: str, words: str) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    code, event, peak = lying_move(lab, lie, wait=3)
    print("PEAK", peak >> 20)
    assert event["event"] == "error"
    assert "host2: " in event["message"]
    assert words in event["message"]
    assert (code, peak < 128 << 20) == (10 if "OpenBundle" in lie else 8, True)
    assert_nothing_lost(lab, before)


WRONG = {
    "if ask == 'Prepare': payload = b'{}'": "the answer to Prepare: tmpfs is missing",
    "if ask == 'OpenBundle': payload = json.dumps({**answer, 'trees': [True]}).encode()": "OpenBundle: trees has 1",
    "if ask == 'Facts': payload = b'{}'": "the answer to Facts: name is missing",
    "if ask == 'Restore': payload = b'{}'": "the answer to Restore: pid is missing",
}


@pytest.mark.slow
def test_an_answer_of_the_wrong_shape_names_the_host_and_the_field(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    for lie, words in WRONG.items():
        code, event, _ = lying_move(lab, lie)
        assert "host2: " in event["message"], lie
        assert words in event["message"], lie
        assert code == (8 if "Facts" in lie else 10), lie
    assert_nothing_lost(lab, before)
