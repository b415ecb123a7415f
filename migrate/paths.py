"""Every directory and file of this host that moves use.

The first stage of an agent (wire/bootstrap.py) is a program on its own, and names RUN itself.
"""

from pathlib import Path

# Kept on the disk.
DATA = Path("/var/lib/pymigrate")
BUNDLES = DATA / "bundles"  # of containers that have come
VOLUMES = DATA / "volumes"  # trees that cannot have the same place as at the source
TREE_MARKS = DATA / "trees"  # the owner of each tree that has come
TMPFS = DATA / "tmpfs"  # contents of tmpfs mounts
DISK_IMAGES = DATA / "incoming"
JOURNALS = DATA / "migrations"
LOGS = DATA / "logs"  # CRIU's, of moves that failed
DEMO = DATA / "demo"
DEMO_ROOTFS = Path("/var/cache/pymigrate/rootfs/redis")

# Gone with a restart.
RUN = Path("/run/pymigrate")
ASKING = RUN / "asking"  # a process for each move in doubt
COMMAND_LINE = RUN / "pymigrate.pyz"  # the newest agent, as a program
IMAGES = RUN / "images"
MEMORY_IMAGES = IMAGES / "memory"  # a tmpfs, mounted while there is something in it
IMAGES_LOCK = RUN / "images.lock"
LAB = RUN / "lab"
MOVING = RUN / "moving"  # a file for each move out of this host that is under way, and one for its progress
CRIU_CHECKED = RUN / "criu-checked"  # the CRIU that works here
PACKED_AGENT = RUN / "packed-agent"  # the code of this host, as a target gets it
PLACE_LOCKS = RUN / "places"
RECEIVING = RUN / "receiving"  # an entry for each rsync that writes here
TAR = Path("/run/pymigrate-tar")  # not below RUN, because the root of a user namespace runs it, too
