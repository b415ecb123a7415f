"""The one table of exit codes: what an error is (its class's `kind`) -> how the process ends."""

EXIT_CODES: dict[str, tuple[int, str]] = {
    "ok": (0, "success"),
    "failure": (1, "failure without a code of its own"),
    "usage": (2, "the command line is wrong"),
    "blocked": (3, "the container cannot move; every reason is listed"),
    "not-found": (4, "no such container or snapshot"),
    "conflict": (5, "the id is in use, or the container's status does not allow it"),
    "invalid": (6, "a bundle, config.json, id or snapshot is malformed"),
    "host": (7, "the other host is unknown, unreachable, refuses us or shows a wrong key"),
    "target": (8, "the other host lacks python3 or criu, or its agent failed"),
    "criu": (9, "CRIU is missing, failed, or answered nonsense"),
    "rolled-back": (10, "the move failed; the container runs at the source as before"),
    "moved-dirty": (11, "the container runs at the target; something is left to be done"),
    "in-doubt": (12, "it is not known where the container is; nothing runs twice"),
    "no-space": (13, "not enough room on a disk"),
    "deadline": (14, "something did not answer in time"),
    "moved": (15, "`attach`: the container was moved to another host"),
    "lost": (16, "the container is lost: its move ended it at the source, and it cannot be restored at the target"),
    "interrupted": (130, "Ctrl-C or SIGTERM; what had begun was undone (of a move that had begun: 10)"),
}


def exit_code(kind: str) -> int:
    """The exit code for an error's kind; 1 for a kind the table does not know."""
    return EXIT_CODES.get(kind, EXIT_CODES["failure"])[0]
