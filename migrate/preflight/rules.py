"""The rules: what keeps a container from moving, in what words, and what a user does about it."""

from collections.abc import Iterable
from dataclasses import dataclass

from migrate.errors import Blocked, UsageError
from runtime.freeze import unfreezable
from runtime.state.record import State


@dataclass(frozen=True)
class Rule:
    """`remedy` is what a user does about it; `allowable` rules can be lifted with --allow."""

    remedy: str
    allowable: bool = False


RULES: dict[str, Rule] = {
    # The house's own.
    "seccomp": Rule(
        "create the container without linux.seccomp; --allow seccomp to carry the filter along", allowable=True
    ),
    "terminal": Rule(
        "--allow terminal to carry it: `pymigrate attach` reaches it at the target; or set process.terminal to false",
        allowable=True,
    ),
    "writable-rootfs": Rule(
        "set root.readonly and mount a tmpfs where it writes; --allow writable-rootfs to carry along what it writes",
        allowable=True,
    ),
    # What would make CRIU fail.
    "status": Rule("only a running container can be moved (`pymigrate logs` shows what it said last)"),
    "rootfs-tmp": Rule("make an empty directory /tmp in the root file system: CRIU needs one to restore"),
    "exec-session": Rule(
        "wait until it has ended, or end it (`exec --detach` starts one that moves along); "
        "--allow exec-session to let it die",
        allowable=True,
    ),
    "host-file": Rule("start the program with stdin, stdout and stderr of the container's own"),
    "device": Rule("close the device before the move"),
    "io-uring": Rule("run the program without io_uring (MariaDB: innodb_use_native_aio=0; Node.js: UV_USE_IO_URING=0)"),
    "special-file": Rule("close it before the move, or run the program without it (what helps depends on its kind)"),
    "watch": Rule(
        "remove the watch before the move, and set it again afterwards (inotify_rm_watch, or close the descriptor)"
    ),
    "ghost-file": Rule("close it, let it get smaller, or give it a name (linkat)"),
    "traced": Rule("detach the debugger"),
    "ended-thread": Rule("have the first thread wait for the others (pthread_join, not pthread_exit)"),
    "unfreezable": Rule(unfreezable.REMEDY),
    "other-uid": Rule(
        "run it as uid 0 inside, or give the container a user namespace (linux.uidMappings); or give this host's root "
        "CAP_SYS_RESOURCE: a container or unit that the host runs in keeps it away (docker run --cap-add SYS_RESOURCE; "
        "CapabilityBoundingSet= in systemd.exec(5))"
    ),
    "user-changed": Rule("start it as that user (process.user), or below a process that stays (an init, a shell)"),
    # Sockets.
    "socket-kind": Rule("close it before the move (programs in Go: GODEBUG=multipathtcp=0)"),
    "socket-namespace": Rule("close it, or do not hand it to the container"),
    "socket-filter": Rule("detach the program (SO_DETACH_BPF)"),
    "tcp-backlog": Rule("let the program accept it; --allow tcp-backlog to lose it", allowable=True),
    "tcp-connecting": Rule(
        "wait until it is connected, or has failed; --allow tcp-connecting to try, which may fail",
        allowable=True,
    ),
    "tcp-closing": Rule("wait until its peer has read it; --allow tcp-closing to lose it", allowable=True),
    "tcp-option": Rule("run the connection without it"),
    "udp-cork": Rule("let the program send what it holds back"),
    "multicast": Rule("let the program join it again after the move; --allow multicast if it does", allowable=True),
    "netlink": Rule("let the program read its messages; listen to fewer groups"),
    "unix-peer": Rule("close the connection, or run the other end in the container"),
    "unix-backlog": Rule("let the program accept it"),
    "unix-message": Rule("let the program read them"),
    "network-device": Rule("remove the interface; a network that `--net` made goes along (docs/network.md)"),
    "host-pid": Rule(
        "create the container with a pid namespace of its own: its process ids must be free at the target"
    ),
    "host-network": Rule(
        "give the container a network namespace of its own; --tcp-close to have it find its connections closed"
    ),
    "file-system": Rule(
        "unmount it, or have the container see it by a bind mount of the host's (`mounts` with the option bind)"
    ),
    "submount": Rule("bind the submount by an entry of its own in `mounts`"),
    "nested-namespace": Rule(
        "run the program without a namespace of its own (mount and network namespaces are carried)"
    ),
    "packet-pipe": Rule("run the program without pipes of packets (pipe2 with O_DIRECT)"),
    "capabilities": Rule(
        "take it out of process.capabilities.inheritable, or have the program drop it there before the bounding set"
    ),
    "deadline": Rule("give the thread another scheduling policy (chrt -o)"),
    "threaded-cgroup": Rule("leave all threads of a process in one cgroup"),
    # What CRIU would lose without a word.
    "host-ipc": Rule(
        "give the container an ipc namespace of its own; --allow host-ipc if it keeps nothing there", allowable=True
    ),
    "message-queue": Rule("close and unlink the queue (mq_unlink)"),
    "eventfd-semaphore": Rule(
        "run the program without EFD_SEMAPHORE; --allow eventfd-semaphore to make plain ones of them", allowable=True
    ),
    "semaphore-undo": Rule(
        "run the program without SEM_UNDO; --allow semaphore-undo if it does not depend on it", allowable=True
    ),
    "personality": Rule(
        "run the program without setarch or personality; --allow personality to lose it", allowable=True
    ),
    "protection-key": Rule(
        "run the program without pkey_mprotect; --allow protection-key to run on without that protection",
        allowable=True,
    ),
    "speculation": Rule(
        "run the program without PR_SET_SPECULATION_CTRL; --allow speculation to run on without that restriction",
        allowable=True,
    ),
    "keyring": Rule("remove the keys (keyctl clear @s); --allow keyring to leave them behind", allowable=True),
    # What differs at the target.
    "id-in-use": Rule("delete or rename the container there"),
    "architecture": Rule("choose a target of the same kind"),
    "cpu": Rule(
        "choose a target whose processor has these features; --allow cpu if the program does not use them",
        allowable=True,
    ),
    "criu": Rule("install criu at the target (apt-get install criu, or vagrant/provision.sh)"),
    "criu-protocol": Rule("install the same criu on both hosts, or 4.2 and newer on both"),
    "criu-version": Rule("install at least this version there; --allow criu-version to try", allowable=True),
    "limit": Rule(
        "raise the limits of root's log-in there (limits.conf(5)), or give root there CAP_SYS_RESOURCE; "
        "or lower that of the program (prlimit); --allow limit to lose it",
        allowable=True,
    ),
    "one-way": Rule(
        "give root there CAP_SYS_RESOURCE (see other-uid); --allow one-way to have the container there for good",
        allowable=True,
    ),
    "bridge": Rule(
        "make the bridge there (ip link add NAME type bridge), or name another with `move --net bridge=NAME`"
    ),
    "address-in-use": Rule("free the address there, or give the container another one with `run --net`"),
    "port-in-use": Rule("free the port there, or give the container a network namespace of its own"),
    "volume": Rule("say what becomes of it: --volume PATH=copy, PATH=shared or PATH=/NEW/PATH"),
    "overlay": Rule("name its layers by plain absolute paths"),
    "overlay-defaults": Rule(
        "set the module's parameters there as here; --allow overlay-defaults to take those there", allowable=True
    ),
    "overlay-index": Rule(
        "mount it with index=off; --allow overlay-index if no file of the lower layers has several names",
        allowable=True,
    ),
    "missing-source": Rule("make it there, with the same contents; --volume PATH=copy or PATH=/NEW/PATH"),
    "joined-namespace": Rule(
        "make one there at this path (ip netns add), or give the container its own (`run --net`; podman --network none)"
    ),
    "not-shared": Rule(
        "mount there what this host has mounted; "
        "--volume PATH=shared if it has another name there, PATH=copy to send it"
    ),
    "foreign-data": Rule("move it away there; --volume PATH=shared to use it, or PATH=/NEW/PATH"),
    "file-differs": Rule("install the same file there; --volume PATH=copy to send what is here"),
    "no-space": Rule("make room there"),
    "rsync": Rule("apt-get install rsync, there and here"),
}


@dataclass(frozen=True)
class Blocker:
    """One reason: which rule, which field or object, what is wrong with it; `advice` is a remedy for this one alone."""

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
    """Raise UsageError for a rule that does not exist or that cannot be lifted."""
    for rule in sorted(allow):
        if rule not in RULES:
            raise UsageError(f"--allow {rule}: there is no such rule", remedy="rules: " + ", ".join(RULES))
        if not RULES[rule].allowable:
            liftable = ", ".join(name for name, found in RULES.items() if found.allowable)
            raise UsageError(
                f"--allow {rule}: this rule cannot be lifted: the move would fail", remedy=f"liftable: {liftable}"
            )


def raise_blocked(state: State, blockers: list[Blocker], allow: frozenset[str], target: str) -> None:
    """Raise Blocked with all that is left after `allow`, if anything is."""
    check_allowed(allow)
    left = [blocker for blocker in blockers if blocker.rule not in allow]
    if left:
        reasons = f"{len(left)} reason{'s' if len(left) > 1 else ''}"
        raise Blocked(
            f"container {state.id} cannot move{f' to {target}' if target else ''}: {reasons}",
            [(blocker.rule, blocker.where, blocker.problem, blocker.remedy) for blocker in left],
        )
