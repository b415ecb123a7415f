"""The rules: each reason that keeps a container from moving, and its remedy."""

from collections.abc import Iterable
from dataclasses import dataclass

from migrate.errors import Blocked, UsageError
from runtime.freeze import unfreezable
from runtime.state.record import State


@dataclass(frozen=True)
class Rule:
    """One rule: `remedy` is what the user can do; `allowable` rules can be lifted with --allow."""

    remedy: str
    allowable: bool = False


RULES: dict[str, Rule] = {
    # Policy: possible, but only if the user asks for it.
    "seccomp": Rule(
        "create the container without linux.seccomp; --allow seccomp to move it with its filter", allowable=True
    ),
    "terminal": Rule(
        "--allow terminal to move it with its terminal (`pymigrate attach` reaches it at the target); "
        "or set process.terminal to false",
        allowable=True,
    ),
    "writable-rootfs": Rule(
        "set root.readonly and mount a tmpfs where the container writes; "
        "--allow writable-rootfs to send the root file system with its changes",
        allowable=True,
    ),
    # What would make CRIU fail.
    "status": Rule("start or resume it: only a running container can move (`pymigrate logs` shows its last output)"),
    "memory-left": Rule("try again when `pymigrate list` shows no memory left"),
    "memory-damaged": Rule("delete the container, and start it again or restore a snapshot"),
    "rootfs-tmp": Rule("make an empty directory /tmp in the root file system: CRIU needs one to restore"),
    "exec-session": Rule(
        "wait until the process exits, or kill it (a process started by `exec --detach` moves along); "
        "--allow exec-session to have the move kill it",
        allowable=True,
    ),
    "host-file": Rule("start the program with the container's own stdin, stdout and stderr"),
    "device": Rule("close the device before the move"),
    "io-uring": Rule("run the program without io_uring (MariaDB: innodb_use_native_aio=0; Node.js: UV_USE_IO_URING=0)"),
    "special-file": Rule("close the file before the move, or run the program without it (its kind decides which)"),
    "watch": Rule(
        "remove the watch before the move, and set it again afterwards (inotify_rm_watch, or close the descriptor)"
    ),
    "ghost-file": Rule("close the file, truncate it, or give it a name (linkat)"),
    "traced": Rule("detach the debugger"),
    "ended-thread": Rule("have the first thread wait for the others (pthread_join, not pthread_exit)"),
    "unfreezable": Rule(unfreezable.REMEDY),
    "other-uid": Rule(
        "run the process as uid 0 inside, or give the container a user namespace (linux.uidMappings); or give root of "
        "this host CAP_SYS_RESOURCE, which a container or unit around the host takes away (docker run --cap-add "
        "SYS_RESOURCE; CapabilityBoundingSet= in systemd.exec(5))"
    ),
    "user-changed": Rule(
        "start the program as that user (process.user), or below a process that stays (an init, a shell)"
    ),
    # Sockets.
    "socket-kind": Rule("close the socket before the move (programs in Go: GODEBUG=multipathtcp=0)"),
    "socket-namespace": Rule("close the socket, or do not pass it to the container"),
    "socket-filter": Rule("detach the eBPF program (SO_DETACH_BPF)"),
    "tcp-backlog": Rule(
        "wait until the program accepts the connection; --allow tcp-backlog to lose it", allowable=True
    ),
    "tcp-connecting": Rule(
        "wait until the connection is established or has failed; --allow tcp-connecting to try, which may fail",
        allowable=True,
    ),
    "tcp-closing": Rule("wait until the peer has received the data; --allow tcp-closing to lose them", allowable=True),
    "tcp-option": Rule("run the connection without this option"),
    "udp-cork": Rule("have the program send the data that it holds back"),
    "multicast": Rule(
        "have the program join the group again after the move; --allow multicast if it does", allowable=True
    ),
    "netlink": Rule("wait until the program has read its messages; listen to fewer groups"),
    "unix-peer": Rule("close the connection, or run the other end in the container"),
    "unix-backlog": Rule("wait until the program accepts the connection"),
    "unix-message": Rule("wait until the program has read the messages"),
    "network-device": Rule("remove the interface; a network made with `--net` moves along (docs/network.md)"),
    "host-pid": Rule("create the container with its own pid namespace: its process ids must be free at the target"),
    "host-network": Rule(
        "give the container its own network namespace; --tcp-close to have the program see its connections closed"
    ),
    "file-system": Rule(
        "unmount the file system, or mount it on the host and bind it into the container (`mounts`, option bind)"
    ),
    "submount": Rule("bind the submount with its own entry in `mounts`"),
    "nested-namespace": Rule(
        "run the program without its own namespace (only mount and network namespaces are carried)"
    ),
    "packet-pipe": Rule("run the program without packet pipes (pipe2 with O_DIRECT)"),
    "capabilities": Rule(
        "remove the capability from process.capabilities.inheritable, or have the program drop it from its "
        "inheritable set before it drops it from its bounding set"
    ),
    "deadline": Rule("give the thread another scheduling policy (chrt -o)"),
    "threaded-cgroup": Rule("keep all threads of a process in one cgroup"),
    # What CRIU would lose silently.
    "host-ipc": Rule(
        "give the container its own ipc namespace; --allow host-ipc if it keeps no objects there", allowable=True
    ),
    "message-queue": Rule("close and unlink the queue (mq_unlink)"),
    "eventfd-semaphore": Rule(
        "run the program without EFD_SEMAPHORE; --allow eventfd-semaphore to turn them into plain eventfds",
        allowable=True,
    ),
    "semaphore-undo": Rule(
        "run the program without SEM_UNDO; --allow semaphore-undo if it does not depend on it", allowable=True
    ),
    "personality": Rule(
        "run the program without setarch or personality; --allow personality to lose it", allowable=True
    ),
    "protection-key": Rule(
        "run the program without pkey_mprotect; --allow protection-key to move it without that protection",
        allowable=True,
    ),
    "speculation": Rule(
        "run the program without PR_SET_SPECULATION_CTRL; --allow speculation to move it without that restriction",
        allowable=True,
    ),
    "keyring": Rule("remove the keys (keyctl clear @s); --allow keyring to leave them behind", allowable=True),
    # What differs at the target.
    "id-in-use": Rule("delete or rename the container at the target"),
    "architecture": Rule("choose a target of the same architecture"),
    "cpu": Rule(
        "choose a target whose processor has these features; --allow cpu if the program does not use them",
        allowable=True,
    ),
    "criu": Rule("install criu at the target (apt-get install criu, or vagrant/provision.sh)"),
    "criu-protocol": Rule("install the same criu on both hosts, or 4.2 and newer on both"),
    "criu-version": Rule(
        "install at least the source's version at the target; --allow criu-version to try", allowable=True
    ),
    "limit": Rule(
        "raise root's login limits at the target (limits.conf(5)), or give root CAP_SYS_RESOURCE there; "
        "or lower the program's limit (prlimit); --allow limit to lose it",
        allowable=True,
    ),
    "one-way": Rule(
        "give root CAP_SYS_RESOURCE at the target (see other-uid); --allow one-way to move it there for good",
        allowable=True,
    ),
    "bridge": Rule(
        "make the bridge at the target (ip link add NAME type bridge), or choose another: `move --net bridge=NAME`"
    ),
    "address-in-use": Rule("free the address at the target, or give the container another one with `run --net`"),
    "port-in-use": Rule("free the port at the target, or give the container its own network namespace"),
    "volume": Rule("choose how to treat the volume: --volume PATH=copy, PATH=shared or PATH=/NEW/PATH"),
    "overlay": Rule("name the layers by plain absolute paths"),
    "overlay-defaults": Rule(
        "set the module's parameters at the target as here; --allow overlay-defaults to use the target's",
        allowable=True,
    ),
    "overlay-index": Rule(
        "mount the overlay with index=off; --allow overlay-index if no file of the lower layers has several names",
        allowable=True,
    ),
    "missing-source": Rule(
        "make it at the target, with the same contents; or use --volume PATH=copy or PATH=/NEW/PATH"
    ),
    "joined-namespace": Rule(
        "make a namespace at the target at this path (ip netns add), or give the container its own "
        "(`run --net`; podman --network none)"
    ),
    "not-shared": Rule(
        "mount the same file system at the target; "
        "--volume PATH=shared if it has another name there, PATH=copy to send the data"
    ),
    "foreign-data": Rule("move the data away at the target; --volume PATH=shared to use them, or PATH=/NEW/PATH"),
    "file-differs": Rule("install the same file at the target; --volume PATH=copy to send this host's"),
    "no-space": Rule("free space at the target"),
    "no-memory": Rule("free memory at the target, or move to a host that has more", allowable=True),
    "rsync": Rule("install rsync on both hosts (apt-get install rsync)"),
}


@dataclass(frozen=True)
class Blocker:
    """One reason not to move: the rule, the field or object, and what is wrong with it.

    `advice` replaces the rule's remedy where a better one is known.
    """

    rule: str
    where: str
    problem: str
    advice: str = ""

    @property
    def remedy(self) -> str:
        return self.advice or RULES[self.rule].remedy

    @property
    def allowable(self) -> bool:
        return RULES[self.rule].allowable


def check_allowed(allow: Iterable[str]) -> None:
    """Raise UsageError if a rule does not exist or cannot be lifted."""
    for rule in sorted(allow):
        if rule not in RULES:
            raise UsageError(f"--allow {rule}: unknown rule", remedy="rules: " + ", ".join(RULES))
        if not RULES[rule].allowable:
            liftable = ", ".join(name for name, found in RULES.items() if found.allowable)
            raise UsageError(
                f"--allow {rule}: this rule cannot be lifted: the move would fail", remedy=f"liftable: {liftable}"
            )


def raise_blocked(state: State, blockers: list[Blocker], allow: frozenset[str], target: str) -> None:
    """Raise Blocked with all blockers that `allow` does not lift, if there are any."""
    check_allowed(allow)
    left = [blocker for blocker in blockers if blocker.rule not in allow]
    if left:
        reasons = f"{len(left)} reason{'s' if len(left) > 1 else ''}"
        raise Blocked(
            f"container {state.id} cannot move{f' to {target}' if target else ''}: {reasons}",
            [(blocker.rule, blocker.where, blocker.problem, blocker.remedy) for blocker in left],
        )
