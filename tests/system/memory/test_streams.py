"""Memory over several connections at once (`move --streams`)."""

import json
from typing import Any

import pytest

from tests.support.hosts import driver
from tests.system.conftest import Lab
from tests.system.move.test_move import assert_still_here

MIB = 1 << 20
SIZE = 24 * MIB
# Random memory; its digest is printed as long as it is right.
SOFT = f"x=$(head -c {SIZE * 3 // 4} /dev/urandom | base64 -w 0); s=${{#x}}; i=0; "
SOFT += 'while :; do i=$((i+1)); [ $((i % 50)) != 1 ] || m=$(echo "$x" | md5sum); '
SOFT += '[ "${m:=}" = "${n:=$m}" ] || exit 1; echo $i; usleep 20000; done'


def move(lab: Lab, *options: str, code: int = 0) -> dict[str, Any]:
    """Return the last event of a move of `web` from host1 to host2."""
    done = lab.on("host1", "pymigrate", "--json", "move", *options, "web", "host2", check=False)
    assert done.returncode == code, (done.stdout, done.stderr)
    event: dict[str, Any] = json.loads((done.stdout or done.stderr).splitlines()[-1])
    return event


def _with(*options: str) -> str:
    """Return the part of a driver that adds options to the move."""
    return f"run = main\nmain = lambda argv: run([*argv, {', '.join(map(repr, options))}])\n"


def test_memory_comes_over_three_connections(lab: Lab) -> None:
    lab.run(script=SOFT)
    before = lab.wait_count("host1", 5)
    connections = "subprocess.run('ss -Htno state established dport = 22 | wc -l > /run/connections', shell=True)"
    done = lab.on("host1", lab.python, "-c", driver("round", after=connections, body=_with("--streams", "3")))
    report = json.loads(done.stdout.splitlines()[-1])
    assert lab.sh("host1", "cat /run/connections") == "3\n"
    assert report["memory_bytes"] > SIZE
    assert report["bytes_sent"] > report["memory_sent"]
    lab.wait_count("host2", before + 60)  # the memory was looked at there
    assert lab.sh("host2", "ps -eo args | grep '[_]_main__.py stream'", check=False) == ""
    assert lab.sh("host2", "ls /run/pymigrate/images/memory", check=False) == ""


def test_a_host_that_takes_no_second_connection(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 5)
    rule = "nft add table ip one; nft add chain ip one in '{ type filter hook input priority 0; }'; "
    rule += "nft add rule ip one in tcp dport 22 'tcp flags & (syn | ack) == syn' reject with tcp reset"
    body = _with("--streams", "4")
    program = driver("pre-copy", before=f"subprocess.run(['ssh', 'host2', {rule!r}], check=True)", body=body)
    try:
        done = lab.on("host1", lab.python, "-c", program, check=False)
    finally:
        lab.sh("host2", "nft delete table ip one")
    event = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, event["workload"]) == (10, "SOURCE"), event
    assert "host2: stream 2 of 4 cannot be opened: cannot connect to" in event["message"]
    assert "--streams 1" in event["remedy"]
    assert_still_here(lab, before)


@pytest.mark.parametrize("number", ["KILL", "STOP"])
def test_a_stream_is_killed_at_the_target(lab: Lab, number: str) -> None:
    """The process that holds the connection there. A stopped one holds nothing up, because the agent reads."""
    lab.run(script=SOFT)
    before = lab.wait_count("host1", 5)
    script = f"kill -{number} $(pgrep -f '[_]_main__.py stream' | head -n 1)"
    action = f"value == 0 and subprocess.run(['ssh', 'host2', {script!r}], check=True, stdin=subprocess.DEVNULL)"
    done = lab.on("host1", lab.python, "-c", driver("round", before=action, body=_with("--streams", "3")), check=False)
    event = json.loads(done.stdout.splitlines()[-1])
    if number == "STOP":
        assert done.returncode == 0, event
        lab.wait_count("host2", before + 60)
        lab.sh("host2", "pkill -KILL -f '[_]_main__.py stream'", check=False)
        return
    assert (done.returncode, event["workload"]) == (10, "SOURCE"), event
    assert "stream" in event["message"]
    assert_still_here(lab, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--streams", "0"), "must be between 1 and 16"),
        (("--streams", "17"), "must be between 1 and 16"),
        (("--streams", "x"), "invalid"),
        (("--streams", "2", "--mode", "stop-and-copy"), "sends none"),
        (("--streams", "2", "--plan"), "measures one connection"),
    ],
)
def test_what_cannot_be_asked_for(lab: Lab, options: tuple[str, ...], words: str) -> None:
    done = lab.on("host1", "pymigrate", "move", *options, "web", "host2", check=False)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr
