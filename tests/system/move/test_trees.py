"""Trees that move with a container: writable root file systems, volumes, overlays; real rsync between lab hosts."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.linux import selfexec
from runtime.spec.default import default_spec
from tests.support.hosts import COUNT, NO_MEMORY, driver, verb
from tests.system.conftest import Lab

WRITABLE = {"root": {"path": "rootfs", "readonly": False}}
# Appends a number to two files, renames, truncates, removes; the sum of what there is can be checked at any time.
WRITER = """
mkdir -p /w/dir; exec 5>>/w/appended 6>/w/gone 7>/w/linked; ln /w/linked /w/dir/other; rm /w/gone /w/linked
mkfifo /w/fifo; i=0
while :; do
  i=$((i+1)); echo $i >&5; echo $i >> /w/reopened; echo $i >&6; echo $i >&7
  echo $i > /w/dir/new; mv /w/dir/new /w/dir/renamed; echo $i > /w/dir/f$((i % 50)); rm -f /w/dir/f$(((i + 25) % 50))
  : > /w/dir/once$i; rm -f /w/dir/once$((i - 5)); echo $i; usleep 2000
done
"""
CHECK = """
set -e
n=$(tail -n 1 /w/reopened); test $(wc -l < /w/reopened) = $n
seq $n | cmp - /w/reopened
m=$(tail -n 1 /w/appended); seq $m | cmp - /w/appended
test $m -ge $n; test $m -le $((n + 1)); test -p /w/fifo; test ! -e /w/gone; test ! -e /w/linked
seq $(tail -n 1 /w/dir/other) | cmp - /w/dir/other
test $(ls -a /w /w/dir | grep -c link_remap) = 0; test $(ls /w/dir | grep -c once) -le 6
"""


def bind(destination: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, "options": ["bind", *options]}


def start(lab: Lab, *mounts: dict[str, Any], script: str | None = None, **fields: Any) -> int:
    """A counting container with further mounts."""
    changes = {**fields, "mounts": [*default_spec()["mounts"], *mounts]}
    lab.run(start=False, **({"script": script} if script else {}), **changes)
    place = "/var/lib/pymigrate/test/web"
    for mount in mounts:
        lab.sh("host1", f"mkdir -p {place}/rootfs{mount['destination']}")
    lab.on("host1", "pymigrate", "run", "-d", "-b", place, "web")
    return lab.wait_count("host1", 3)


def move(lab: Lab, *options: str, source: str = "host1", target: str = "host2") -> dict[str, Any]:
    done = lab.on(source, "pymigrate", "--json", "move", *options, "web", target)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def refused(lab: Lab, *options: str) -> list[str]:
    """The rules that a move to host2 breaks."""
    done = lab.on("host1", "pymigrate", "--json", "move", *options, "web", "host2", check=False)
    assert done.returncode == 3, (done.stdout, done.stderr)
    return [blocker["rule"] for blocker in json.loads(done.stdout.splitlines()[-1])["blockers"]]


@pytest.fixture
def hosts(lab: Lab) -> Iterator[Lab]:
    """The lab, with a directory /srv of each host's own."""
    for host in ("host1", "host2"):
        lab.sh(host, "mount -t tmpfs tmpfs /srv")
    yield lab
    for host in ("host1", "host2"):
        lab.sh(host, "for i in $(pymigrate list -q 2>/dev/null); do pymigrate delete -f $i; done; umount -l /srv")


def test_a_container_that_writes_goes_there_and_back(lab: Lab) -> None:
    lab.run(script=WRITER, **WRITABLE)
    before = lab.wait_count("host1", 50)
    there = move(lab, "--allow", "writable-rootfs")
    before = lab.wait_count("host2", before + 20)
    assert lab.sh("host1", "find /var/lib/pymigrate -name 'link_remap*'") == "", "CRIU's names are removed here as well"
    passes = there["passes"]
    assert [item["number"] for item in passes] == list(range(1, len(passes) + 1))
    assert [item["frozen"] for item in passes] == [False] * (len(passes) - 1) + [True]
    assert all(item["tree"] == "rootfs" and item["seconds"] > 0 for item in passes)
    frozen_check(lab, "host2")
    back = move(lab, "--allow", "writable-rootfs", source="host2", target="host1")
    lab.wait_count("host1", before + 20)
    frozen_check(lab, "host1")
    assert back["passes"][0]["bytes_sent"] < there["passes"][0]["bytes_sent"] / 4, "the copy left there was renewed"
    numbers = lab.numbers("host1")
    assert numbers == list(range(1, len(numbers) + 1))
    assert (
        lab.sh("host1", "find /var/lib/pymigrate -name 'link_remap*'; ls /var/lib/pymigrate/bundles", check=False) == ""
    )


def frozen_check(lab: Lab, host: str) -> None:
    """What the writer has written, while it is paused."""
    lab.on(host, "pymigrate", "pause", "web")
    root = lab.state(host)["rootfs"]
    lab.sh(host, CHECK.replace("/w", f"{root}/w"))
    lab.on(host, "pymigrate", "resume", "web")


def test_a_failed_move_removes_what_it_brought_and_no_more(hosts: Lab) -> None:
    hosts.sh("host1", "mkdir -p /srv/a/data; echo here > /srv/a/data/file")
    hosts.sh("host2", "mkdir -p /srv/a; echo other > /srv/a/mine")
    before = start(hosts, bind("/data", "/srv/a/data", "rw"))
    hosts.sh(
        "host2", "mkdir -p /var/lib/pymigrate/incoming; mount -t tmpfs -o size=16k tmpfs /var/lib/pymigrate/incoming"
    )
    try:
        program = NO_MEMORY + verb("move", "--volume", "/data=copy", "web", "host2")
        done = hosts.on("host1", hosts.python, "-c", program, check=False)
    finally:
        hosts.sh("host2", "umount /var/lib/pymigrate/incoming")
    assert done.returncode == 10, (done.stdout, done.stderr)
    hosts.wait_count("host1", before)
    assert hosts.sh("host2", "cd /srv; find . | sort").split() == [".", "./a", "./a/mine"]
    assert hosts.sh("host2", "ls /var/lib/pymigrate/trees") == ""


def test_a_volume_is_copied_there_and_renewed_here(hosts: Lab) -> None:
    hosts.sh(
        "host1",
        "mkdir -p /srv/data/d; cd /srv/data; dd if=/dev/urandom of=big bs=1M count=5 2>/dev/null; ln big d/hard; "
        "mknod null c 1 3; setfattr -n user.x -v y big; setfattr -n trusted.y -v z d; setfacl -m u:1234:r big; "
        "truncate -s 50M sparse; chown 77:88 d; touch -d '2001-01-01 01:02:03.123456789' big; "
        "printf x > \"$(printf 'new\\nline\\377')\"",
    )
    script = "exec 5<>/data/big; i=0; while :; do i=$((i+1)); echo $i; echo $i >> /data/log; usleep 20000; done"
    hosts.sh("host1", "echo old > /srv/data/same; touch -d 2001-01-01 /srv/data/same")
    before = start(hosts, bind("/data", "/srv/data", "rw"), script=script)
    assert refused(hosts) == ["volume"]
    there = move(hosts, "--volume", "/data=copy")
    before = hosts.wait_count("host2", before)
    assert [item["tree"] for item in there["passes"]].count("/data") >= 2
    look = (
        "cd /srv/data; find . ! -name log ! -path . -printf '%P %s %m %U:%G %n %T@ %y\\n' | sort; cat big | sha256sum; "
    )
    look += "(getfattr -h -d -m - -R .; getfacl -R .) 2>/dev/null; stat -c %t:%T null"
    look = f"({look}) | cat -v"
    assert hosts.sh("host2", look) == hosts.sh("host1", look)
    assert int(hosts.sh("host2", "stat -c %b /srv/data/sparse")) < 100
    hosts.sh("host2", "echo new > /srv/data/same; touch -d 2001-01-01 /srv/data/same")
    back = move(hosts, "--volume", "/data=copy", source="host2", target="host1")
    hosts.wait_count("host1", before)
    assert hosts.sh("host1", "cat /srv/data/same") == "new\n"
    assert back["bytes_sent"] < there["bytes_sent"] / 4
    numbers = [int(line) for line in hosts.sh("host1", "cat /srv/data/log").split()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_what_somebody_else_has_there_is_not_overwritten(hosts: Lab) -> None:
    hosts.sh("host1", "mkdir /srv/data; echo x > /srv/data/x")
    hosts.sh("host2", "mkdir /srv/data; echo mine > /srv/data/x")
    before = start(hosts, bind("/data", "/srv/data", "rw"))
    assert refused(hosts, "--volume", "/data=copy") == ["foreign-data"]
    hosts.wait_count("host1", before)
    assert hosts.sh("host2", "cat /srv/data/x") == "mine\n"


def test_a_volume_at_another_place(hosts: Lab) -> None:
    hosts.sh("host1", "mkdir /srv/data; echo same > /srv/data/x; touch -d @1000000000 /srv/data/x")
    script = "exec 5</data/x; i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done"
    before = start(hosts, bind("/data", "/srv/data", "rw"), script=script)
    option = ("--volume", "/data=/srv/other")
    assert refused(hosts, *option) == ["missing-source"]
    hosts.sh("host2", "mkdir /srv/other; echo longer > /srv/other/x")
    assert refused(hosts, *option) == ["file-differs"]
    hosts.sh("host2", "echo same > /srv/other/x")
    move(hosts, *option)
    hosts.wait_count("host2", before)
    assert hosts.on("host2", "pymigrate", "exec", "web", "cat", "/data/x").stdout == "same\n"


def test_a_shared_volume(lab: Lab, tmp_path: Path) -> None:
    """The hosts of a lab share this machine's /tmp."""
    before = start(lab, bind("/data", str(tmp_path), "rw"), script="exec 5>/data/f; i=0; while :; do i=$((i+1)); "
                   "echo $i; echo $i >&5; usleep 20000; done")  # fmt: skip
    move(lab, "--volume", "/data=shared")
    after = lab.wait_count("host2", before)
    numbers = [int(line) for line in (tmp_path / "f").read_text().split()]
    assert numbers[: after - 1] == list(range(1, after))


def test_a_small_file_goes_along(hosts: Lab) -> None:
    hosts.sh("host1", "echo 'nameserver 192.0.2.1' > /srv/resolv.conf; echo a > /srv/hosts")
    hosts.sh("host2", "echo b > /srv/hosts")
    before = start(hosts)
    hosts.on("host1", "pymigrate", "delete", "-f", "web")
    config = "/var/lib/pymigrate/test/web/config.json"
    value = json.loads(hosts.sh("host1", f"cat {config}"))
    value["mounts"] += [bind(f"/etc/{name}", f"/srv/{name}") for name in ("resolv.conf", "hosts")]
    hosts.sh(
        "host1", f"cat > {config} <<'X'\n{json.dumps(value)}\nX\ncd {config[:-12]}/rootfs/etc; touch resolv.conf hosts"
    )
    hosts.on("host1", "pymigrate", "run", "-d", "-b", config[:-12], "web")
    before = hosts.wait_count("host1", 3)
    move(hosts)
    hosts.wait_count("host2", before)
    seen = hosts.on("host2", "pymigrate", "exec", "web", "cat", "/etc/resolv.conf", "/etc/hosts").stdout
    assert seen == "nameserver 192.0.2.1\nb\n"


def test_an_overlay_goes_along(hosts: Lab) -> None:
    hosts.sh("host1", "cd /srv; mkdir l u w; echo low > l/low; echo gone > l/removed; mkdir l/dir; echo x > l/dir/x")
    layers = ["lowerdir=/srv/l,upperdir=/srv/u,workdir=/srv/w"]
    overlay = {"destination": "/data", "type": "overlay", "source": "overlay", "options": layers}
    script = "rm -r /data/removed /data/dir; mkdir /data/dir; exec 5<>/data/low 6>/data/g; rm /data/g; i=0; "
    script += "while :; do i=$((i+1)); echo $i; echo $i >> /data/log; echo $i >&6; usleep 20000; done"
    before = start(hosts, overlay, script=script)
    hosts.sh("host2", "mkdir /srv/l; echo other > /srv/l/low")
    assert refused(hosts) == ["foreign-data"]
    parameter = "/sys/module/overlay/parameters/metacopy"
    hosts.sh("host2", f"rm -r /srv/l; echo Y > /srv/parameter; mount --bind /srv/parameter {parameter}")
    try:
        assert refused(hosts) == ["overlay-defaults"]
    finally:
        hosts.sh("host2", f"umount {parameter}")
    move(hosts)
    before = hosts.wait_count("host2", before)
    inside = hosts.on("host2", "pymigrate", "exec", "web", "find", "/data").stdout.split()
    assert sorted(inside) == ["/data", "/data/dir", "/data/log", "/data/low"]
    move(hosts, source="host2", target="host1")
    hosts.wait_count("host1", before)
    numbers = [int(line) for line in hosts.on("host1", "pymigrate", "exec", "web", "cat", "/data/log").stdout.split()]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("options", ["redirect_dir=on,metacopy=on", "volatile,xino=on", "index=on"])
def test_an_overlay_with_options_goes_along(hosts: Lab, options: str) -> None:
    """The container sees the same, mounted in the same way: renamed directories, changed modes, linked files."""
    hosts.sh("host1", "cd /srv; mkdir l u w; mkdir -p l/dir/below; echo x > l/dir/below/x; echo y > l/mode; "
             "echo a > l/one; ln l/one l/two")  # fmt: skip
    layers = ["lowerdir=/srv/l,upperdir=/srv/u,workdir=/srv/w," + options]
    overlay = {"destination": "/data", "type": "overlay", "source": "overlay", "options": layers}
    rename = "mv /data/dir /data/renamed; " if "redirect" in options else ""
    before = start(hosts, overlay, script=f"{rename}chmod 600 /data/mode; echo b >> /data/one; {COUNT}")
    if options == "index=on":
        assert refused(hosts) == ["overlay-index"]
        return

    def seen(host: str) -> str:
        pid = hosts.state(host)["pid"]
        look = "find . -printf '%P %m %y %l\\n' | sort; find . -type f | sort | xargs md5sum"
        mounted = f"grep ' /data ' /proc/{pid}/mountinfo | sed 's/.* - //'"
        return hosts.sh(host, f"{mounted}; cd /proc/{pid}/root/data; {look}")

    view = seen("host1")
    for source, target in (("host1", "host2"), ("host2", "host1")):
        move(hosts, source=source, target=target)
        before = hosts.wait_count(target, before)
        assert seen(target) == view


def test_disk_full_in_the_middle_of_a_pass(hosts: Lab) -> None:
    hosts.sh("host1", "mkdir /srv/data; head -c 5000000 /dev/urandom > /srv/data/big")
    before = start(hosts, bind("/data", "/srv/data", "rw"))
    hosts.sh("host2", "umount -l /srv; mount -t tmpfs -o size=8m tmpfs /srv")
    program = driver(
        "send-ahead",
        before="subprocess.run(['ssh', 'host2', 'head -c 5000000 /dev/zero > /srv/fill'], check=True)",
        body="run = main; main = lambda argv: run([*argv, '--volume', '/data=copy'])",
    )
    done = hosts.on("host1", hosts.python, "-c", program, check=False)
    event = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, event["workload"]) == (10, "SOURCE"), (done.stdout, done.stderr)
    assert "no room at host2" in event["message"]
    hosts.wait_count("host1", before)
    assert hosts.sh("host2", "ls /srv; ls /var/lib/pymigrate/trees").split() == ["fill"]


LATE = """
cd /data; mkdir -p todir tolink/a gone/deep again tofile; echo x > tolink/a/f; echo x > gone/deep/f; echo x > again/f
echo x > tofile/f; echo x > plain; echo 1 > linked; ln linked other; echo x > same; touch -d 2001-01-01 same
exec 7>>linked; rm linked; i=0
while :; do i=$((i+1)); echo $i; [ -e go ] && break; usleep 20000; done
rm -r gone tolink again tofile; mkdir again; ln -s /etc tolink; echo y > tofile; rmdir todir; echo y > "#todo"
echo y > ";x"; echo y > -dash; chmod 600 plain; chown 5:6 plain; echo y > same; touch -d 2001-01-01 same
echo y > "$(printf 'new\\nline\\377')"; : > done
while :; do i=$((i+1)); echo $i; usleep 20000; [ -e on ] && echo 2 >&7 && rm on; done
"""


@pytest.mark.parametrize("change", ["mv /srv/data /srv/old; mkdir /srv/data", "mount -t tmpfs tmpfs /srv/data/d"])
def test_what_the_container_sees_is_not_there_any_more(hosts: Lab, change: str) -> None:
    hosts.sh("host1", "mkdir -p /srv/data/d; echo x > /srv/data/d/x")
    before = start(hosts, bind("/data", "/srv/data", "rw"))
    hosts.sh("host1", change)
    assert refused(hosts, "--volume", "/data=copy") == ["volume"]
    hosts.wait_count("host1", before)


def test_no_link_in_a_tree_is_followed(tmp_path: Path) -> None:
    """A container may put one where a directory was while rsync reads."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "tree" / "d").mkdir(parents=True)
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "outside")
    for place in ("outside/file", "tree/d/file"):
        (tmp_path / place).write_text("x")
    for name, word in (("d", "x"), ("link", "")):
        argv = [
            *selfexec.command("migrate.files.no_follow", str(tmp_path / "tree")),
            "/bin/cat",
            f"{tmp_path}/tree/{name}/file",
        ]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
        assert (done.stdout, "symbolic links" in done.stderr) == (word, not word), done.stderr


def test_what_changes_between_the_last_look_and_the_freeze(hosts: Lab) -> None:
    hosts.sh("host1", "mkdir /srv/data")
    before = start(hosts, bind("/data", "/srv/data", "rw"), script=LATE)
    program = driver(
        "start-last-pass",
        before="open('/srv/data/go', 'w'); deadline = time.monotonic() + 20\n"
        "    while not os.path.exists('/srv/data/done') and time.monotonic() < deadline: time.sleep(0.02)",
        body="run = main; main = lambda argv: run([*argv, '--volume', '/data=copy'])",
    )
    done = hosts.on("host1", hosts.python, "-c", program, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    hosts.wait_count("host2", before)
    look = "cd /srv/data; cat same tofile './#todo'; find . ! -path . -printf '%P %l %s %m %U:%G %n %T@ %y\\n' | "
    look += "sort | cat -v"
    assert hosts.sh("host2", look) == hosts.sh("host1", look)
    hosts.sh("host2", "touch /srv/data/on; for i in $(seq 100); do [ -e /srv/data/on ] || break; sleep 0.1; done")
    assert hosts.sh("host2", "cat /srv/data/other") == "1\n2\n", "the open file is still the one of this name"


@pytest.mark.slow
def test_the_copies_of_a_recovered_move_can_be_renewed(hosts: Lab) -> None:
    hosts.sh("host1", "mkdir /srv/data")
    before = start(hosts, bind("/data", "/srv/data", "rw"), **WRITABLE)
    options = ("--volume", "/data=copy", "--allow", "writable-rootfs")
    program = driver(
        "end-source",
        after="os.kill(os.getpid(), 9)",
        body=f"run = main; main = lambda argv: run([*argv, *{options!r}])",
    )
    assert hosts.on("host1", hosts.python, "-c", program, check=False).returncode == 137
    hosts.on("host1", "pymigrate", "recover", "web")
    before = hosts.wait_count("host2", before)
    move(hosts, *options, source="host2", target="host1")
    hosts.wait_count("host1", before)
    assert hosts.state("host1")["bundle"] == "/var/lib/pymigrate/test/web"


def test_a_container_of_the_same_name_does_not_replace_what_another_has_written(lab: Lab) -> None:
    lab.run(script="echo precious > /precious; " + COUNT, **WRITABLE)
    lab.wait_count("host1", 3)
    move(lab, "--allow", "writable-rootfs")
    lab.wait_count("host2", 3)
    lab.on("host2", "pymigrate", "delete", "--force", "web")
    lab.sh("host1", "rm -r /var/lib/pymigrate/test/web")
    lab.run(**WRITABLE)
    before = lab.wait_count("host1", 3)
    move(lab, "--allow", "writable-rootfs")
    lab.wait_count("host2", before)
    assert lab.sh("host2", "cat /var/lib/pymigrate/bundles/web/rootfs/precious") == "precious\n"


@pytest.mark.parametrize("option", ["/nothing=copy", "/data=", "data=copy", "/data=x"])
def test_bad_options(hosts: Lab, option: str) -> None:
    hosts.sh("host1", "mkdir /srv/data")
    start(hosts, bind("/data", "/srv/data", "ro"))
    done = hosts.on("host1", "pymigrate", "validate", "web", "--volume", option, check=False)
    assert (done.returncode, "--volume" in done.stderr) == (2, True)
