"""What --net and the annotation io.pymigrate.net may say."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import Conflict, SpecError
from runtime.lifecycle.provision import claim_network
from runtime.spec import config as spec_config
from runtime.spec import network
from runtime.spec.annotations import NET
from runtime.spec.config import Spec, load
from runtime.spec.default import default_spec
from runtime.state.record import State
from runtime.state.store import Store

FULL = "bridge=br0,ip=10.88.0.5/24,ip=fd88::5/64,gw=10.88.0.1,gw=fe80::1,mac=02:00:00:00:00:05,name=net0,mtu=1400"


def bundle(tmp_path: Path, **annotations: str) -> Path:
    config = default_spec() | {"annotations": {f"io.pymigrate.{name}": text for name, text in annotations.items()}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_text_means_the_same_once_it_is_written_again() -> None:
    parsed = network.parse(FULL, "--net")
    assert parsed.text() == FULL
    assert parsed.name == "net0"
    assert [(address.text, address.length) for address in parsed.addresses] == [("10.88.0.5", 24), ("fd88::5", 64)]
    assert network.parse("ip=FD88:0::5/64,bridge=br0", "--net").text() == "bridge=br0,ip=fd88::5/64,name=eth0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not one of bridge="),
        ("br0", "'br0' is not one of"),
        ("bridge=br0", "ip= is missing"),
        ("ip=10.88.0.5/24", "bridge= is missing"),
        ("bridge=br0,ip=10.88.0.5", "ip=10.88.0.5: is not an interface's address"),
        ("bridge=br0,ip=10.88.0.5/33", "ip=10.88.0.5/33"),
        ("bridge=br0,ip=10.88.0/24", "ip=10.88.0/24"),
        ("bridge=br0,ip=224.0.0.1/24", "ip=224.0.0.1/24"),
        ("bridge=br0,ip=ff02::1/64", "ip=ff02::1/64"),
        ("bridge=br0,ip=127.0.0.1/8", "ip=127.0.0.1/8"),
        ("bridge=br0,ip=::1/128", "ip=::1/128"),
        ("bridge=br0,ip=10.88.0.5/24,ip=10.88.0.5/16", "has an address twice"),
        ("bridge=br0,ip=10.88.0.5/24,gw=10.89.0.1", "gw=10.89.0.1: is not in the network of any ip="),
        ("bridge=br0,ip=10.88.0.5/24,gw=fd88::1", "gw=fd88::1: is IPv6, but no ip= is"),
        ("bridge=br0,ip=10.88.0.5/24,gw=10.88.0.1,gw=10.88.0.2", "two gateways of one family"),
        ("bridge=br0,ip=10.88.0.5/24,mac=01:00:00:00:00:05", "mac=01:00:00:00:00:05: must be a unicast address"),
        ("bridge=br0,ip=10.88.0.5/24,mac=02:00:00:00:00", "mac=02:00:00:00:00"),
        ("bridge=br0,ip=10.88.0.5/24,name=lo", "name=lo: is not a valid"),
        ("bridge=br0,ip=10.88.0.5/24,name=../x", "name=../x: is not a valid"),
        ("bridge=br1,bridge=br0,ip=10.88.0.5/24", "bridge= is given twice"),
        ("bridge=a-name-of-16-byte,ip=10.88.0.5/24", "bridge=a-name-of-16-byte: is not a valid"),
        ("bridge=br0,ip=fd88::5/64,mtu=1000", "mtu=1000: IPv6 needs at least 1280"),
        ("bridge=br0,ip=10.88.0.5/24,mtu=67", "mtu=67: must be"),
        ("ns:net", "must be absolute"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SpecError) as refused:
        load(bundle(tmp_path), net=text)
    assert str(refused.value).startswith("--net: ")
    assert words in str(refused.value)
    with pytest.raises(SpecError) as refused:
        load(bundle(tmp_path, net=text))
    assert str(refused.value).startswith("annotations.io.pymigrate.net: ")


@given(st.text(alphabet="bridgepmacntu=,.:/0129af\0\n ", max_size=60))
def test_no_text_does_harm(text: str) -> None:
    try:
        parsed = network.parse(text, "--net")
    except SpecError as error:
        words = str(error)
    else:
        words = parsed.text()
        assert network.parse(words, "--net") == parsed
    assert words.isprintable()


def spaces(spec: Spec) -> object:
    return spec.namespaces.get("network", "the host's"), spec.network and spec.network.bridge


def test_the_flag_wins_over_the_annotation_and_both_over_the_namespaces(tmp_path: Path) -> None:
    assert spaces(load(bundle(tmp_path))) == (None, None)
    for text, found in (
        ("host", ("the host's", None)),
        ("none", (None, None)),
        ("ns:/run/netns/x", ("/run/netns/x", None)),
        ("/run/netns/x", ("/run/netns/x", None)),
        ("bridge=br0,ip=10.88.0.5/24", (None, "br0")),
    ):
        spec = load(bundle(tmp_path), net=text)
        assert spaces(spec) == found
        assert spaces(load(bundle(tmp_path, net=text))) == found
        assert spaces(load(bundle(tmp_path, net="bridge=br9,ip=10.0.0.1/8"), net=text)) == found
        # What is kept in the state says the same again, whatever the bundle says.
        assert spaces(load(bundle(tmp_path, net="none"), spec.annotations)) == found
    assert spaces(load(bundle(tmp_path, net="host"), {})) == (None, None)


def test_a_hardware_address_is_made_once(tmp_path: Path) -> None:
    spec = spec_config.with_mac(load(bundle(tmp_path), net="bridge=br0,ip=10.88.0.5/24"))
    assert spec.network is not None
    assert spec.network.mac is not None
    assert int(spec.network.mac[:2], 16) & 3 == 2  # locally administered, of one interface
    assert spec_config.with_mac(spec) is spec
    again = load(bundle(tmp_path), spec.annotations)
    assert again.network is not None
    assert again.network.mac == spec.network.mac


def test_only_the_messages_of_pyroute2_are_imported() -> None:
    """The rest brings an event loop, and takes four times as long; the agent's zip does not have it."""
    code = "import sys, runtime.network.netlink; print({'asyncio', 'sqlite3', 'pyroute2.iproute'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_of_two_that_ask_for_an_address_at_once_one_gets_it(tmp_path: Path) -> None:
    """Neither is seen to live yet, and each could find it free before the other has said that it takes it."""
    store = Store(tmp_path)
    wanted = network.parse("bridge=br0,ip=10.88.0.5/24", "--net")
    together = Barrier(2)

    def ask(container_id: str) -> bool:
        with store.lock(container_id):
            store.create(container_id)
            state = State(container_id, "/b", "/b/r", "now", "/log", annotations={NET: wanted.text()})
            together.wait(10)
            try:
                claim_network(store, state, wanted)
                return True
            except Conflict:
                return False
            finally:
                together.wait(10)  # who was refused has nothing left; the other one is still being made

    with ThreadPoolExecutor(2) as pool:
        for number in range(100):
            assert sorted(pool.map(ask, (f"a{number}", f"b{number}"))) == [False, True]
            assert len(store.ids()) == 1
            store.remove(store.ids()[0])
