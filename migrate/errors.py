"""What can go wrong while a container is moved. criu_rpc/errors.py draws the tree of all errors."""

from criu_rpc.errors import DeadlineExceeded as DeadlineExceeded
from criu_rpc.errors import Error


class MigrateError(Error):
    """Base of the errors of this package."""


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


class Interrupted(MigrateError):
    kind = "interrupted"


class Cancelled(Interrupted):
    """`pymigrate cancel` asked for the end of this move, and of no other."""


class SnapshotError(MigrateError):
    kind = "invalid"


class DemoFailed(MigrateError):
    """A check of the demo failed, or one of its commands."""


class Blocked(MigrateError):
    """Preflight found blockers: `problems` are (rule, where, problem, remedy) of each."""

    kind = "blocked"

    def __init__(self, message: str, problems: list[tuple[str, str, str, str]]) -> None:
        super().__init__(message)
        self.problems = problems


class MoveFailed(MigrateError):
    """A move that had begun and failed.

    `cause` is the error that stopped it. The exit code says where the container is, not what the cause was.
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
