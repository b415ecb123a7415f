"""What moves of real services cost: `python -m tests.bench.services [ROUNDS] [SERVICE...]`; 5 rounds of all of them."""

import os
import sys

from tests.support import services
from tests.system.conftest import Lab


def main(argv: list[str]) -> None:
    rounds, wanted = int(argv[0]) if argv else 5, argv[1:]
    lab = Lab(f"bench-{os.getpid()}")
    lab.lab("up")
    try:
        for service in services.SERVICES:
            if not wanted or service.name in wanted:
                print(services.table([services.travel(service(), lab, rounds)]), flush=True)
    finally:
        lab.lab("down")


if __name__ == "__main__":
    main(sys.argv[1:])
