"""pymigrate validate ID [HOST]: list every reason why a container cannot move. The exit status is 3 if there is one."""

import argparse
import json

from migrate.cli import move_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the container")
    parser.add_argument("host", nargs="?", help="the target, [USER@]HOST; without it only the container is checked")
    move_arguments.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from migrate.cli.exit_codes import exit_code
    from migrate.preflight import landlock
    from migrate.preflight.container import container_blockers
    from migrate.preflight.rules import check_allowed
    from migrate.preflight.target import check_target, plan_blockers
    from migrate.preflight.volumes import plan
    from runtime import notices
    from runtime.spec import config as spec_config
    from runtime.state.kept_config import load_kept
    from runtime.state.status import Status
    from runtime.state.store import Store

    wanted = move_arguments.wanted(args, args.id)
    check_allowed(wanted.allow)
    store = Store(args.root)
    state = store.load(wanted.id)
    spec = load_kept(state)
    there = spec_config.elsewhere(spec, wanted.net)
    trees = plan(state, spec, wanted.volumes)
    blockers = container_blockers(state, spec, tcp_close=wanted.tcp_close) + plan_blockers(trees)
    if wanted.host:
        from migrate.preflight.hostfacts import gather
        from migrate.wire.peer import connect
        from migrate.wire.questions import FactsQuery

        with connect(wanted.host, root=str(args.root)) as peer:
            blockers += check_target(peer, store, state, there, trees, gather(FactsQuery()))[0]
    left = [blocker for blocker in blockers if blocker.rule not in wanted.allow]
    words = landlock.warning(state.id, landlock.suspects(state.pid, spec)) if state.status is Status.RUNNING else ""
    if args.json:
        rows = [
            {"rule": b.rule, "where": b.where, "problem": b.problem, "remedy": b.remedy, "allowable": b.allowable}
            for b in left
        ]
        warnings = [words] if words else []
        found = {"id": state.id, "target": args.host, "movable": not left, "blockers": rows, "warnings": warnings}
        print(json.dumps(found))
    elif left:
        for blocker in left:
            print(f"{blocker.rule}: {blocker.where}: {blocker.problem}\n  {blocker.remedy}")
    else:
        print(f"{state.id} can move" + (f" to {wanted.host}" if wanted.host else ""))
    if words and not args.json:
        notices.warn(words)
    return exit_code("blocked") if left else 0
