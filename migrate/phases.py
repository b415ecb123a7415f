"""The phases of a move and which may follow which: every rule about order lives in this table."""

import enum


class Phase(enum.StrEnum):
    """Where a move is. Names are what users see in progress lines, journals and reports."""

    PREFLIGHT = "preflight"
    SEED = "seed"
    PRE_COPY = "pre-copy"
    STOP_AND_COPY = "stop-and-copy"
    PREPARED = "prepared"
    COMMITTED = "committed"
    RESUMED = "resumed"
    ABORTED = "aborted"
    IN_DOUBT = "in-doubt"
    LOST = "lost"
    FORGOTTEN = "forgotten"


NEXT: dict[Phase | None, frozenset[Phase]] = {
    None: frozenset({Phase.PREFLIGHT}),
    Phase.PREFLIGHT: frozenset({Phase.SEED, Phase.ABORTED}),
    Phase.SEED: frozenset({Phase.PRE_COPY, Phase.STOP_AND_COPY, Phase.ABORTED}),
    Phase.PRE_COPY: frozenset({Phase.PRE_COPY, Phase.STOP_AND_COPY, Phase.ABORTED}),
    Phase.STOP_AND_COPY: frozenset({Phase.PREPARED, Phase.ABORTED}),
    Phase.PREPARED: frozenset({Phase.COMMITTED, Phase.ABORTED}),
    # Once more when the container is killed; aborted by `recover`, see there.
    Phase.COMMITTED: frozenset(
        {Phase.COMMITTED, Phase.RESUMED, Phase.IN_DOUBT, Phase.ABORTED, Phase.LOST, Phase.FORGOTTEN}
    ),
    Phase.IN_DOUBT: frozenset({Phase.RESUMED, Phase.ABORTED, Phase.IN_DOUBT, Phase.LOST, Phase.FORGOTTEN}),
    Phase.LOST: frozenset({Phase.LOST, Phase.RESUMED, Phase.FORGOTTEN}),  # asked again, it may turn out to be whole
    Phase.RESUMED: frozenset(),
    Phase.ABORTED: frozenset({Phase.ABORTED}),  # once more when the target could be told at last
    Phase.FORGOTTEN: frozenset(),
}

FINAL = frozenset({Phase.RESUMED, Phase.ABORTED, Phase.FORGOTTEN})
OPEN = frozenset({Phase.COMMITTED, Phase.IN_DOUBT, Phase.LOST})  # at the source: `recover` has something to decide


def workload(phase: Phase | None, role: str = "source") -> str:
    """Return where the container is when a move stopped in `phase`: SOURCE, TARGET, NEITHER or UNKNOWN.

    `role` is the host's that has recorded the phase: a target that holds whole images cannot know what the source has
    decided since, and it may have lost the line that says so.
    """
    if phase is Phase.RESUMED:
        return "TARGET"
    if phase is Phase.LOST:
        return "NEITHER"
    if phase in (Phase.COMMITTED, Phase.IN_DOUBT, Phase.FORGOTTEN):
        return "UNKNOWN"
    if role == "target" and phase in (Phase.STOP_AND_COPY, Phase.PREPARED):
        return "UNKNOWN"
    return "SOURCE"
