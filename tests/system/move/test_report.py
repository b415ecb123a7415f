"""`pymigrate move --report FILE`: a page about the move, which cannot keep it from happening."""

from tests.system.conftest import Lab

# The directory of the report vanishes when the container has been handed over.
VANISHES = """
import os, sys
from migrate import faults
from migrate.cli import main
os.mkdir("/run/reports")
faults.at("hand-over", after=lambda _: os.rmdir("/run/reports"))
sys.exit(main(["move", "--report", "/run/reports/r.html", "web", "host2"]))
"""


def test_the_page_tells_what_the_move_reports(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    lab.on("host1", "pymigrate", "move", "--report", "/run/r.html", "web", "host2")
    lab.wait_count("host2", before)
    page = lab.sh("host1", "cat /run/r.html; rm /run/r.html")
    assert "<h1>web: host1 → host2</h1>" in page
    assert {f'"{name}":' for name in ("dump", "restore", "resume", "downtime_s")} <= set(
        page.replace("&quot;", '"').split()
    )
    failed = lab.on("host2", "pymigrate", "move", "--report", "/run/r.html", "web", "nowhere", check=False)
    assert failed.returncode == 7
    assert "the name nowhere is unknown" in lab.sh("host2", "cat /run/r.html; rm /run/r.html")


def test_a_report_that_cannot_be_written_does_not_fail_the_move(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    done = lab.on("host1", "pymigrate", "move", "--report", "/run", "web", "host2", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert lab.ids("host1") == ["web"]
    done = lab.on("host1", lab.python, "-c", VANISHES)
    assert "warning: the report is not written: No such file or directory: /run/reports/r.html" in done.stderr
    lab.wait_count("host2", before)
