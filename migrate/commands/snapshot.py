"""pymigrate snapshot save|restore|show: save containers to disk and restore them."""

import argparse
import dataclasses
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    save = actions.add_parser("save", help="save a running container, which keeps running")
    save.add_argument("id", help="the container")
    save.add_argument("dir", type=Path, help="directory to create; must not exist")
    save.add_argument("--stop", action="store_true", help="kill the container once the snapshot is written")
    save.add_argument("--allow", action="append", default=[], metavar="RULE", help="lift a rule of validate")
    restore = actions.add_parser("restore", help="restore a container from a snapshot")
    restore.add_argument("dir", type=Path, help="the snapshot")
    restore.add_argument("--id", help="id of the restored container (default: that of the saved one)")
    restore.add_argument("--rootfs", type=Path, help="directory of the root file system, if it has moved")
    restore.add_argument("--net", help="give it another network (docs/network.md)")
    restore.add_argument("--eager", action="store_true", help="run it only when all its memory is in place")
    fate = restore.add_mutually_exclusive_group()
    fate.add_argument("--tcp-close", action="store_true", help="close its TCP connections; peers are not told")
    fate.add_argument(
        "--tcp-established", action="store_true", help="keep its TCP connections, whose peers must still be waiting"
    )
    show = actions.add_parser("show", help="describe a snapshot and check that it is intact")
    show.add_argument("dir", type=Path, help="the snapshot")


def run(args: argparse.Namespace) -> int:
    from runtime.state import lazy
    from runtime.state.store import Store

    store = Store(args.root)
    match args.action:
        case "save":
            from migrate.snapshots import save as snapshots
            from migrate.ui.text import size

            manifest = snapshots.save(store, args.id, args.dir, allow=frozenset(args.allow), stop=args.stop)
            text = f"{manifest.id}: saved to {args.dir} ({size(manifest.size)})"
        case "restore":
            from migrate.snapshots import restore as snapshot_restore

            fate = "close" if args.tcp_close else "keep" if args.tcp_established else None
            state = snapshot_restore.restore(
                store, args.dir, new_id=args.id, rootfs=args.rootfs, net=args.net, connections=fate, eager=args.eager
            )
            left = lazy.left(state)
            if args.json:
                memory = {"memory": left.plain()} if left else {}
                print(json.dumps({"event": "restored", "id": state.id, "pid": state.pid, **memory}))
                return 0
            text = f"{state.id}: restored from {args.dir} (pid {state.pid}" + (f"; {left})" if left else ")")
        case _:
            return _show(args)
    if args.json:
        print(json.dumps({"event": args.action, **dataclasses.asdict(manifest)}))
    else:
        print(text)
    return 0


def _show(args: argparse.Namespace) -> int:
    from migrate.cli.error_report import printable
    from migrate.snapshots.manifest import Snapshot
    from migrate.snapshots.view import demands
    from migrate.ui.text import size
    from runtime.spec import config as spec_config

    with Snapshot.open(args.dir) as snapshot:
        snapshot.verify()
        manifest, warnings = snapshot.manifest, snapshot.warnings
        wanted = list(demands(spec_config.load(snapshot.path, manifest.annotations)))
    if args.json:
        more = {"warnings": warnings, "restore": wanted}
        print(json.dumps({"event": "show", **dataclasses.asdict(manifest), **more}))
        return 0
    shown = ("id", "host", "created", "criu", "machine", "kernel", "bundle", "rootfs")
    rows = [(name, getattr(manifest, name)) for name in shown]
    rows.append(("images", f"{len(manifest.images)} files, {size(manifest.size)}, all intact"))
    rows += [("digest", manifest.digest)] if manifest.digest else []
    rows += [("connected", connection) for connection in manifest.connections]
    rows += wanted
    rows += [("warning", warning) for warning in warnings]
    print("\n".join(printable(f"{name + ':':<10} {value}") for name, value in rows))
    return 0
