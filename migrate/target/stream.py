"""The command of one stream (migrate/wire/streams.py): hand its input to the agent of the move, which reads it.

It stays until the agent closes their connection, because sshd ends the stream when its command exits.
"""

import socket
import sys

from migrate.limits import STREAM_OPEN_TIMEOUT


def main(argv: list[str]) -> int:
    """argv: path of the agent's socket, number of the stream."""
    place, number = argv
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as agent:
        agent.settimeout(STREAM_OPEN_TIMEOUT)
        try:
            agent.connect(place)
            socket.send_fds(agent, [bytes([int(number)])], [0])
        except (OSError, ValueError) as error:
            print(f"pymigrate stream {number}: {error}", file=sys.stderr)
            return 1
        agent.settimeout(None)
        agent.recv(1)
    return 0
