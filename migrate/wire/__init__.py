"""Calls to another host: SSH, the agent's code, frames, the page stream."""

import sys

# paramiko imports it for `Match exec` in its own parser of ssh_config, which wire/ssh_config.py replaces: 40 ms.
sys.modules.setdefault("invoke", None)  # type: ignore[arg-type]
