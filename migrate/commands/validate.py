"""pymigrate validate ID [HOST]: list every reason why a container cannot move; exit status 3 if there is one."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the container")
    parser.add_argument("host", nargs="?", help="[USER@]HOST to move to; without it only the container is checked")
    parser.add_argument("--allow", action="append", default=[], metavar="RULE", help="lift a rule (repeatable)")
    parser.add_argument(
        "--volume", action="append", default=[], metavar="PATH=copy|shared|NEWPATH",
        help="what is bound on PATH: send it along, or use the target's at the same path or another (repeatable)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from migrate.exits import exit_code
    from migrate.validate import check_allowed, check_target, container_blockers, plan_blockers
    from migrate.volumes import parse, plan
    from runtime.spec import load
    from runtime.state import Store

    allow = frozenset(args.allow)
    check_allowed(allow)
    store = Store(args.root)
    state = store.load(args.id)
    spec = load(Path(state.bundle), state.annotations)
    trees = plan(state, spec, parse(args.volume))
    blockers = container_blockers(store, state, spec) + plan_blockers(trees)
    if args.host:
        from migrate.peer import connect

        with connect(args.host, root=str(args.root)) as peer:
            blockers += check_target(peer, store, state, spec, trees)[0]
    left = [blocker for blocker in blockers if blocker.rule not in allow]
    if args.json:
        rows = [
            {"rule": b.rule, "where": b.where, "problem": b.problem, "remedy": b.remedy, "allowable": b.allowable}
            for b in left
        ]
        print(json.dumps({"id": state.id, "target": args.host, "movable": not left, "blockers": rows}))
    elif left:
        for blocker in left:
            print(f"{blocker.rule}: {blocker.where}: {blocker.problem}\n  {blocker.remedy}")
    else:
        print(f"{state.id} can move" + (f" to {args.host}" if args.host else ""))
    return exit_code("blocked") if left else 0
