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


NEXT: dict[Phase | None, frozenset[Phase]] = {
    None: frozenset({Phase.PREFLIGHT}),
    Phase.PREFLIGHT: frozenset({Phase.SEED, Phase.ABORTED}),
    Phase.SEED: frozenset({Phase.PRE_COPY, Phase.STOP_AND_COPY, Phase.ABORTED}),
    Phase.PRE_COPY: frozenset({Phase.PRE_COPY, Phase.STOP_AND_COPY, Phase.ABORTED}),
    Phase.STOP_AND_COPY: frozenset({Phase.PREPARED, Phase.ABORTED}),
    Phase.PREPARED: frozenset({Phase.COMMITTED, Phase.ABORTED}),
    # Once more when the container is killed; aborted by `recover`, see there.
    Phase.COMMITTED: frozenset({Phase.COMMITTED, Phase.RESUMED, Phase.IN_DOUBT, Phase.ABORTED}),
    Phase.IN_DOUBT: frozenset({Phase.RESUMED, Phase.ABORTED, Phase.IN_DOUBT}),
    Phase.RESUMED: frozenset(),
    Phase.ABORTED: frozenset({Phase.ABORTED}),  # once more when the target could be told at last
}

FINAL = frozenset({Phase.RESUMED, Phase.ABORTED})


def workload(phase: Phase | None) -> str:
    """Where the container is when a move stopped in `phase`: SOURCE, TARGET or UNKNOWN."""
    if phase is Phase.RESUMED:
        return "TARGET"
    if phase in (Phase.COMMITTED, Phase.IN_DOUBT):
        return "UNKNOWN"
    return "SOURCE"
