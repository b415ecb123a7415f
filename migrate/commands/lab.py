"""pymigrate lab up|down|status|exec|ssh-config: make hosts on this machine to try moves between."""

import argparse
import json
import shlex
from typing import TYPE_CHECKING

from migrate import relaunch

if TYPE_CHECKING:
    from migrate.lab.model import Host


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    up = actions.add_parser("up", help="make hosts, each with its own namespaces, files, bridge br0 and sshd")
    up.add_argument(
        "-n",
        "--number",
        type=int,
        default=2,
        help="number of hosts: host1, host2, ... (default 2); a host `client` is always added",
    )
    up.add_argument("--disk", metavar="SIZE", help="limit the size of /var/lib/pymigrate of each host, such as 64m")
    actions.add_parser("down", help="kill everything in the hosts and remove them")
    actions.add_parser("status", help="list the hosts")
    run = actions.add_parser("exec", help="run a command in a host: lab exec host1 -- CMD")
    run.add_argument("host")
    run.add_argument("command", nargs=argparse.REMAINDER)
    actions.add_parser("ssh-config", help="print an ssh_config to reach the hosts from this machine")


def run(args: argparse.Namespace) -> int:
    from migrate.errors import UsageError
    from migrate.lab import build, model

    lab = model.current_lab()
    match args.action:
        case "up":
            if not 1 <= args.number <= model.LARGEST:
                raise UsageError(f"--number {args.number}: must be 1 to {model.LARGEST}")
            names = [f"host{number}" for number in range(1, args.number + 1)]
            for host in build.up(lab, names, disk=args.disk):
                print(f"{host.name}  {host.address}")
        case "down":
            build.down(lab)
        case "status":
            _status(model.hosts(lab), as_json=args.json)
        case "exec":
            command = args.command[1:] if args.command[:1] == ["--"] else args.command
            if not command:
                raise UsageError("no command to run", remedy="pymigrate lab exec HOST -- CMD [ARG...]")
            return _exec(model.find(lab, args.host), command)
        case _:
            print(_ssh_config(lab), end="")
    return 0


def _exec(host: "Host", command: list[str]) -> int:
    from migrate.lab.enter import enter
    from migrate.lab.model import LabError, environment

    try:
        return enter(host.pid, host.cgroups, command, environment(host.lab))
    except OSError as error:
        raise LabError(f"host {host.name} is not up: {error.strerror or error}", remedy="pymigrate lab up") from None


def _status(hosts: list["Host"], *, as_json: bool) -> None:
    from migrate.ui.text import table
    from runtime.linux import processes

    rows: list[dict[str, object]] = [
        {"name": host.name, "address": host.address, "pid": host.pid,
         "state": "up" if processes.start_time(host.pid) is not None else "dead"}
        for host in hosts
    ]  # fmt: skip
    if as_json:
        print(json.dumps(rows))
        return
    names = ("name", "address", "pid", "state")
    cells = [tuple(str(row[name]) for name in names) for row in rows]
    for line in table(tuple(map(str.upper, names)), cells):
        print(line)


def _ssh_config(lab: str) -> str:
    """Return an ssh_config. No route leads to the hosts, so ssh talks to an sshd on the stdio of `lab exec`."""
    from migrate.lab import model

    text = ""
    for host in model.hosts(lab):
        relay = shlex.join(
            relaunch.argv("lab", "exec", host.name, "--", "/usr/sbin/sshd", "-i", "-f", "/run/sshd_config")
        ).replace("%", "%%")  # ssh expands %
        text += (
            f"Host {host.name}\n  User root\n  IdentityFile {host.directory}/ssh/id_ed25519\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {host.directory}/ssh/known_hosts\n"
            f"  ProxyCommand env PYMIGRATE_LAB={lab} {relay}\n"
        )
    return text
