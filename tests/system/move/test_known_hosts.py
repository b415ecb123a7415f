"""Every kind of line of known_hosts, against a real sshd; OpenSSH itself says which of them let a host in."""

import json
import os
import subprocess
from pathlib import Path

from tests.system.conftest import Lab

# Reads {name: contents of known_hosts}; prints what a log-in with each says, "" when it works.
LOGIN = """
import json, pathlib, sys
from migrate.wire import ssh
for name, text in json.load(sys.stdin).items():
    pathlib.Path("/root/.ssh/known_hosts").write_bytes(text.encode("latin-1"))
    try:
        ssh.login("host2").close()
        print(json.dumps([name, ""]))
    except Exception as error:
        print(json.dumps([name, f"{type(error).__name__}: {error}"]))
"""
OPENSSH = ["ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"]
REVOKED, UNKNOWN, CHANGED, FINE = "is marked as revoked", "is not in known_hosts", "has changed", ""


def hashed(tmp_path: Path, line: str) -> str:
    path = tmp_path / "hashed"
    path.write_text(line)
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", path], check=True, capture_output=True)
    return path.read_text()


def test_every_line_means_what_it_means_to_openssh(lab: Lab, tmp_path: Path) -> None:
    lines = lab.on("host1", "cat", "/root/.ssh/known_hosts").stdout.splitlines()
    keys = {line.split(",")[0]: line.split(" ", 1)[1] for line in lines}
    key, other = keys["host2"], keys["host1"]
    garbage = os.urandom(3000).decode("latin-1").replace("\n", "") + "\nhost2 ssh-ed25519\n@ \n@revoked\n|1|| x y\n"
    cases = {
        "plain": (f"host2 {key}", FINE),
        "several names, tabs, a comment": (f"a,HOST2\t{key}\troot@host2", FINE),
        "a marker for a certificate": (f"@cert-authority host2 {other}\nhost2 {key}", FINE),
        "only a certificate": (f"@cert-authority host2 {key}", UNKNOWN),
        "revoked": (f"@revoked host2 {key}\nhost2 {key}", REVOKED),
        "revoked afterwards, for all": (f"host2 {key}\n@revoked * {key}", REVOKED),
        "another revoked": (f"@revoked host2 {other}\nhost2 {key}", FINE),
        "revoked for another host": (f"@revoked host9 {key}\nhost2 {key}", FINE),
        "an unknown marker": (f"@new host2 {key}", UNKNOWN),
        "a pattern": (f"ho?t* {key}", FINE),
        "a negated pattern": (f"*,!host2 {key}", UNKNOWN),
        "brackets are no pattern": (f"host[2] {key}", UNKNOWN),
        "hashed": (hashed(tmp_path, f"host2 {key}\n"), FINE),
        "another port": (f"[host2]:2222 {key}", UNKNOWN),
        "changed": (f"host2 {other}", CHANGED),
        "one of two of its type": (f"host2 {other}\nhost2 {key}", FINE),
        "an unknown type": (f"host2 ssh-new AAAAB3NzaC1kc3M=\nhost2 {key}", FINE),
        "a key of another type": (f"host2 ssh-rsa {key.split()[1]}\n", UNKNOWN),
        "no base64": (f"host2 ssh-ed25519 AAAA!\nhost2 {key}", FINE),
        "garbage": (f"{garbage}host2 {key}", FINE),
        "a long line": (f"host9,{'x' * 100_000} {key}\nhost2 {key}", FINE),
        "nothing": ("", UNKNOWN),
    }
    texts = {name: f"{text}\n" for name, (text, _) in cases.items()}
    lab.sh("host1", "cp /root/.ssh/known_hosts /root/.ssh/saved")
    try:
        done = subprocess.run(
            lab.argv("host1", lab.python, "-c", LOGIN), env=lab.environment, input=json.dumps(texts),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        found = dict(json.loads(line) for line in done.stdout.splitlines())
        assert found.keys() == cases.keys(), done.stderr
        for name, (_, words) in cases.items():
            assert words in found[name], (name, found[name])
            assert bool(words) == found[name].startswith("HostError: host2: "), (name, found[name])
        for name, (_, words) in cases.items():
            (tmp_path / "known").write_bytes(texts[name].encode("latin-1"))
            lab.sh("host1", f"cp {tmp_path}/known /root/.ssh/known_hosts")
            status = lab.on("host1", *OPENSSH, "host2", "true", check=False).returncode
            assert (status == 0) == (words == FINE), name
    finally:
        lab.sh("host1", "mv /root/.ssh/saved /root/.ssh/known_hosts")


def test_files_that_are_named_or_cannot_be_read(lab: Lab, tmp_path: Path) -> None:
    """Each ends a move with a sentence that names the file, or is passed over; what revokes keys counts."""
    key = lab.sh("host1", "grep ^host2 /root/.ssh/known_hosts").split(" ", 1)[1]
    (tmp_path / "known").write_text(f"host2 {key}")
    (tmp_path / "with space").write_text(f"host2 {key}")
    (tmp_path / "revoked").write_text(f"@revoked host2 {key}")
    (tmp_path / "list").write_text(key)
    (tmp_path / "other").write_text(lab.sh("host1", "grep ^host1 /root/.ssh/known_hosts").split(" ", 1)[1])
    os.mkfifo(tmp_path / "fifo")
    os.truncate(os.open(tmp_path / "huge", os.O_CREAT | os.O_RDWR), 1 << 40)
    subprocess.run(["ssh-keygen", "-q", "-k", "-f", tmp_path / "krl", tmp_path / "list"], check=True)
    cases = {
        f"UserKnownHostsFile {tmp_path}/none {tmp_path}/fifo {tmp_path}/known": FINE,
        f"GlobalKnownHostsFile {tmp_path}/revoked": REVOKED,
        f"UserKnownHostsFile {tmp_path}": "Is a directory",
        f"UserKnownHostsFile {tmp_path}/huge": "is larger than 64 MiB",
        'UserKnownHostsFile "/x': "invalid quotes",
        "UserKnownHostsFile ~nobody-knows/x": "No such user nobody-knows",
        "UserKnownHostsFile %d/x": UNKNOWN,
        "UserKnownHostsFile %d/.ssh/known_hosts": FINE,
        f'UserKnownHostsFile {tmp_path}/none "{tmp_path}/with space" ~/none': FINE,
        f'GlobalKnownHostsFile "{tmp_path}/with space" {tmp_path}/revoked': REVOKED,
        "IdentityFile ~/.ssh/missing": "there is no key to log in as root with",
        "IdentityFile ~/.ssh/missing\nIdentityFile %d/.ssh/id_ed25519": FINE,
        "IdentityFile %x": "the token %x is not supported",
        f"RevokedHostKeys {tmp_path}/list": REVOKED,
        f"RevokedHostKeys {tmp_path}/krl": REVOKED,
        f"RevokedHostKeys {tmp_path}/other": FINE,
        f"RevokedHostKeys {tmp_path}/none": "cannot be searched for revoked host keys",
    }
    code = (
        "import pathlib, sys\nfrom migrate.wire import ssh\nfrom migrate.errors import HostError\n"
        "for text in sys.stdin.read().split('\\0'):\n"
        "    pathlib.Path('/root/.ssh/config').write_text(text + '\\n')\n"
        "    try: ssh.login('host2').close(); print()\n"
        "    except HostError as error: print(error)\n"
    )
    try:
        done = subprocess.run(
            lab.argv("host1", lab.python, "-c", code), env=lab.environment, input="\0".join(cases),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    finally:
        lab.sh("host1", "rm -f /root/.ssh/config")
    found = done.stdout.split("\n")[:-1]
    assert len(found) == len(cases), (done.stdout, done.stderr)
    for (line, words), said in zip(cases.items(), found, strict=True):
        assert (words in said, bool(said)) == (True, bool(words)), (line, said)


def test_a_marker_does_not_end_a_move(lab: Lab) -> None:
    lab.run()
    lab.sh("host1", "cp /root/.ssh/known_hosts /root/.ssh/saved; "
           "sed -n 's/^host2,[^ ]*/@cert-authority */p' /root/.ssh/saved >> /root/.ssh/known_hosts")  # fmt: skip
    try:
        lab.on("host1", "pymigrate", "move", "web", "host2")
    finally:
        lab.sh("host1", "mv /root/.ssh/saved /root/.ssh/known_hosts")
    assert lab.ids("host2") == ["web"]
