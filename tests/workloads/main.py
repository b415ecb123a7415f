"""See workloads/harness.py."""

import sys

sys.path.insert(0, "/programs")
import files
import groups
import harness
import ipc
import memory
import motion
import processes
import sandboxes
import sockets
import timers
import watches

MODULES = (files, groups, ipc, memory, motion, processes, sandboxes, sockets, timers, watches)

if __name__ == "__main__":
    harness.run(sys.argv[1:] or list(harness.KINDS))
