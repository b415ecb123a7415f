"""What of a container CRIU must be told, at dump and at restore, and what is made around a restored tree.

Kept out of CRIU's hands, because it is cheaper or sounder so:
- the network namespace is external: it is made anew with `lo` up before the source is frozen;
- cgroups are ignored: the restored tree is born in the container's new cgroup (criu_exec.py);
- stdout and stderr are pipes of the monitor: at restore the new monitor's pipes are inherited in their place.
"""

import contextlib
import dataclasses
import os
import signal
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from criu_rpc.client import Criu, RestoreSession
from criu_rpc.options import DumpOptions, RestoreOptions
from criu_rpc.swrk import Swrk
from runtime import cgroups, namespaces, processes, selfexec, shim
from runtime.errors import ContainerError
from runtime.spec import Spec
from runtime.state import State, Store

_NETNS_KEY = "pymigrate-net"
DEATH_TIMEOUT = 30.0
LOG_LEVEL = 4
