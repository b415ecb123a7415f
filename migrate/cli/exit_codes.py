"""The table of exit codes: an error's `kind` -> the exit status of the process and its meaning."""

EXIT_CODES: dict[str, tuple[int, str]] = {
    "ok": (0, "success"),
    "failure": (1, "any other failure"),
    "usage": (2, "invalid command line"),
    "blocked": (3, "the container cannot move; every reason is listed"),
    "not-found": (4, "no such container or snapshot"),
    "conflict": (5, "the id is in use, or the status of the container or of its move does not allow it"),
    "invalid": (6, "a bundle, config.json, id or snapshot is malformed"),
    "host": (7, "the other host is unknown, unreachable, refuses the log-in or has a wrong host key"),
    "target": (8, "the other host lacks python3 or criu, or its agent failed"),
    "criu": (9, "CRIU is missing, failed, or gave an invalid answer"),
    "rolled-back": (10, "the move failed; the container runs at the source as before"),
    "moved-dirty": (11, "the container runs at the target, but the clean-up is incomplete"),
    "in-doubt": (12, "it is unknown where the container is; it does not run twice"),
    "no-space": (13, "not enough space on a disk"),
    "deadline": (14, "a deadline passed"),
    "moved": (15, "`attach`: the container was moved to another host"),
    "lost": (16, "the container is lost: its move ended it at the source, and it cannot be restored at the target"),
    "interrupted": (130, "Ctrl-C, SIGTERM or `cancel`; what had begun was undone (for a move that had begun: 10)"),
}


def exit_code(kind: str) -> int:
    """Return the exit code for an error's kind, or 1 for a kind that is not in the table."""
    return EXIT_CODES.get(kind, EXIT_CODES["failure"])[0]
