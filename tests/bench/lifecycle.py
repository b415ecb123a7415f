"""`make bench`: what a container's life costs with pymigrate, beside runc and crun, in one run.

Each round does every job once with every runtime, one after the other, so that a slow moment of the machine meets all
of them; the table shows medians, and ratios to runc of the same round.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
ROOTFS = Path("/var/cache/pymigrate/rootfs/busybox")
PYTHON = "/opt/pymigrate/sealed/python3"
Job = Callable[[str, Path], float]


def launcher(directory: Path) -> Path:
    """What provision.sh installs as /usr/local/bin/pymigrate, for this checkout."""
    path = directory / "pymigrate"
    path.write_text(
        f"#!{PYTHON} -IS\nimport sys\nsys.path.insert(0, {str(TOP)!r})\nfrom migrate.cli import entry\nentry()\n"
    )
    path.chmod(0o755)
    return path


def bundle(directory: Path, *args: str) -> Path:
    directory.mkdir()
    shutil.copytree(ROOTFS, directory / "rootfs", symlinks=True)
    sys.path.insert(0, str(TOP))
    from runtime.spec.default import default_spec

    config = default_spec()
    config["process"]["args"] = list(args)
    # runc 1.1 knows neither of these two versions, and no cgroup namespace on its cgroup version 1.
    config["ociVersion"] = "1.0.2"
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def timed(*commands: list[str]) -> float:
    """Milliseconds for commands one after the other; each must succeed."""
    begin = time.perf_counter()
    for argv in commands:
        pid = os.posix_spawn(
            argv[0], argv, os.environ, file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 0, 1),
            ],
        )  # fmt: skip
        if status := os.waitpid(pid, 0)[1]:
            raise SystemExit(f"bench: {' '.join(argv)}: status {status}")
    return (time.perf_counter() - begin) * 1000


def run_true(runtime: str, where: Path) -> float:
    return timed([runtime, "run", "--bundle", str(where), "bench"])


def create_start_delete(runtime: str, where: Path) -> float:
    create = [runtime, "create", "--bundle", str(where), "bench"]
    return timed(create, [runtime, "start", "bench"], [runtime, "delete", "--force", "bench"])


def state(runtime: str, where: Path) -> float:
    subprocess.run([runtime, "create", "--bundle", str(where), "bench"], check=True, stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        return timed([runtime, "state", "bench"])
    finally:
        subprocess.run([runtime, "delete", "--force", "bench"], check=True)


JOBS: dict[str, Job] = {
    "run /bin/true": run_true,
    "create + start + delete": create_start_delete,
    "state": state,
}


def monitor_memory(runtime: str, where: Path) -> float:
    """MiB of resident memory of a detached container's monitor, private and shared pages together."""
    subprocess.run([runtime, "run", "-d", "--bundle", str(where), "bench"], check=True)
    try:
        record = json.loads(Path("/run/opencontainer/containers/bench/state.json").read_text())
        status = Path(f"/proc/{record['monitor_pid']}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024
    finally:
        subprocess.run([runtime, "delete", "--force", "bench"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", "--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        runtimes = {"runc": shutil.which("runc") or "", "crun": shutil.which("crun") or ""}
        runtimes = {name: path for name, path in runtimes.items() if path}
        runtimes["pymigrate"] = str(launcher(Path(scratch)))
        short = bundle(Path(scratch, "short"), "/bin/true")
        for name, path in list(runtimes.items()):
            tried = subprocess.run(
                [path, "run", "--bundle", short, "bench"], capture_output=True, stdin=subprocess.DEVNULL
            )
            if tried.returncode or b"drop all" in tried.stderr:  # crun 1.8 sets no limits on a hybrid machine
                print(f"{name} does not run here: {tried.stderr.decode().strip()[:100]}")
                del runtimes[name]
        print(f"{'':<26}" + "".join(f"{name:>12}" for name in runtimes) + f"{'ratio to runc':>16}")
        for title, job in JOBS.items():
            times: dict[str, list[float]] = {name: [] for name in runtimes}
            for _ in range(rounds):
                for name, path in runtimes.items():
                    times[name].append(job(path, short))
            line = f"{title:<26}" + "".join(f"{statistics.median(spent):>9.1f} ms" for spent in times.values())
            if "runc" in times:
                ratios = [ours / theirs for ours, theirs in zip(times["pymigrate"], times["runc"], strict=True)]
                line += f"{statistics.median(ratios):>16.2f}"
            print(line, flush=True)
        sleeping = bundle(Path(scratch, "sleeping"), "sleep", "100")
        print(f"{'monitor, resident':<26}{monitor_memory(runtimes['pymigrate'], sleeping):>9.1f} MiB")


if __name__ == "__main__":
    main()
