"""What can go wrong while something is moved.

    MigrateError (failure)
    +-- UsageError (usage)             the command line asks for what does not exist or does not fit
    +-- Blocked (blocked)              preflight found reasons why the container cannot move
    +-- HostError (host)               the other host: unknown, unreachable, refused, wrong key
    +-- TargetError (target)           the other host answers but cannot take part
    +-- ProtocolError (target)         what came over the wire is not what the protocol allows
    +-- NoSpace (no-space)
    +-- DeadlineExceeded (deadline)
    +-- Interrupted (interrupted)      Ctrl-C or SIGTERM
    +-- SnapshotError (invalid)        a snapshot directory that is not one, or is damaged
    +-- MoveFailed                     a move that had begun; says where the container is now
        +-- RolledBack (rolled-back)   it runs at the source as before
        +-- MovedDirty (moved-dirty)   it runs at the target; something is left to be done by hand
        +-- InDoubt (in-doubt)         nobody knows yet
        +-- Lost (lost)                it was ended at the source and cannot be restored at the target

The message of each is one lower-case sentence without a full stop that names what is wrong and where;
`remedy`, when there is one, says what to do. `kind` is the key into the table of exit codes (cli/exit_codes.py).
"""


class MigrateError(Exception):
    """Base of all errors of this package."""

    kind = "failure"

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy


class UsageError(MigrateError):
    kind = "usage"


class HostError(MigrateError):
    kind = "host"


class TargetError(MigrateError):
    kind = "target"


class ProtocolError(TargetError):
    pass


class NoSpace(MigrateError):
    kind = "no-space"


class DeadlineExceeded(MigrateError):
    kind = "deadline"


class Interrupted(MigrateError):
    kind = "interrupted"


class SnapshotError(MigrateError):
    kind = "invalid"


class Blocked(MigrateError):
    """Preflight refused: `problems` are (rule, where, problem, remedy) of each blocker."""

    kind = "blocked"

    def __init__(self, message: str, problems: list[tuple[str, str, str, str]]) -> None:
        super().__init__(message)
        self.problems = problems


class MoveFailed(MigrateError):
    """A move that had begun and did not end well.

    `workload` is SOURCE, TARGET, NEITHER or UNKNOWN: where the container is now. `cause` is the error that
    stopped it; its exit code gives way to the one that says where the container is.
    """

    workload = "UNKNOWN"

    def __init__(self, message: str, *, cause: BaseException | None = None, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.cause = cause


class RolledBack(MoveFailed):
    kind = "rolled-back"
    workload = "SOURCE"


class MovedDirty(MoveFailed):
    kind = "moved-dirty"
    workload = "TARGET"


class InDoubt(MoveFailed):
    kind = "in-doubt"
    workload = "UNKNOWN"


class Lost(MoveFailed):
    kind = "lost"
    workload = "NEITHER"
