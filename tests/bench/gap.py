"""One move in one line: `python -m tests.bench.gap [-n ROUNDS] [--link LINK] [--shared] MIB RATE [ARGUMENT...]`.

A container holds MIB of memory, with --shared of shared memory, and writes RATE MiB/s of it. Further arguments are
those of the move. The line has the gap that the program saw, the sum of its gaps in the ten seconds after, the total,
words of its memory that were wrong, and what the move itself reports.
"""

import argparse
import os
import tempfile
from pathlib import Path

from tests.bench import links, writer
from tests.bench.measure import Load, Run, measure, put_bundles
from tests.bench.ways import Ours


def line(run: Run) -> str:
    """Return the line of one move."""
    report = run.report
    phases = ", ".join(f"{name} {seconds * 1000:.0f}" for name, seconds in report.get("phases", {}).items())
    text = f"gap {run.gap * 1000:.0f} ms, after {run.after * 1000:.0f} ms, before {run.before * 1000:.0f} ms, "
    text += f"total {run.total:.2f} s, bad {run.bad}, {report['mode']}, reported {report['downtime_s'] * 1000:.0f} ms, "
    text += f"wire {run.wire / 2**20:.0f} MiB, rounds {len(report['rounds'])}; ms: {phases}"
    for warning in report["warnings"]:
        text += f"\n    warning: {warning}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--rounds", type=int, default=1)
    parser.add_argument("--link", choices=[link.key for link in links.LINKS], default="unshaped")
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("memory", type=int, metavar="MIB")
    parser.add_argument("dirty", type=float, metavar="RATE")
    wanted, more = parser.parse_known_args()
    link = next(link for link in links.LINKS if link.key == wanted.link)
    with tempfile.TemporaryDirectory() as directory, links.lab(f"gap-{os.getpid()}", link) as lab:
        put_bundles(lab, writer.build(Path(directory)), Load(wanted.memory, wanted.dirty, wanted.shared))
        for _ in range(wanted.rounds):
            print(line(measure(lab, Ours(lab, tuple(more)))), flush=True)


if __name__ == "__main__":
    main()
