"""The phases of a move, which may follow which, and the theory of operation: who may die when, and what happens then.

The source decides. Both sides journal each phase; the line of a decision is on the disk before it has consequences.
COMMITTED in the source's journal is the one point of no return.

    phase          the source                               the target
    PREFLIGHT      checks everything, changes nothing       answers questions
    SEED           sends files while the container runs     makes everything around the container
    PRE_COPY       sends memory while the container runs    keeps it in a store
    STOP_AND_COPY  CRIU freezes and dumps it                receives pages and images
    PREPARED       still holds it frozen                    holds the restored tree, which has not run
    COMMITTED      kills it                                 still holds the restored tree
    RESUMED        removes what is left of it               resumes the restored tree

Two invariants hold whichever process dies. The container never runs twice, because the target resumes it only when
none of its processes can run again at the source: each was sent SIGKILL while it was stopped (runtime/checkpoint/
dump.py, Dump.kill). It is never lost, because from PREPARED on the target keeps the images until it runs. They are in
the target's memory at first: a power cut of the target within a second after COMMITTED loses it.

Before COMMITTED:
- Any failure at the source (an exception, Ctrl-C, a deadline): the move rolls back. CRIU undoes its dump and thaws the
  container, the target is told to undo its part, the journal says ABORTED. If the target cannot be told, the next move
  to it has it discard what it has.
- The source's process is killed: CRIU's socket closes, so CRIU thaws the container. The target sees the connection end
  and undoes its part; at PREPARED it cannot know what was decided, and keeps the images for a verdict.
- CRIU is killed: the guard (runtime/freeze/guard.py) keeps the container frozen until its dump is repaired.
- The agent or the target dies: the source sees the connection end, and rolls back.

From COMMITTED on the container does not run at the source again, with one exception:
- The source's process is killed after the line is on the disk and before the container is: CRIU thaws it, so it runs
  here and what the target holds is old. `recover` sees that, and has the target undo the move: ABORTED.
- The source's process is killed later: the container is dead here. `recover` repeats the end of the source and has the
  target resume the container.
- The agent or the connection dies before it confirms: the source asks again over new connections (source/settle.py).
  The target resumes what it holds, or restores it once more from the images. If no connection works, the move is
  IN_DOUBT: both sides keep what they have, and a process keeps asking (source/ask_later.py).
- The target can no longer restore it: LOST. Nothing is removed.
- An operator closes the entry by hand: FORGOTTEN.
"""

import enum


class Phase(enum.StrEnum):
    """Where a move is. The values are what users see in progress lines, journals and reports."""

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
    # COMMITTED again when the container is killed. ABORTED by `recover`, when the container still runs at the source.
    Phase.COMMITTED: frozenset(
        {Phase.COMMITTED, Phase.RESUMED, Phase.IN_DOUBT, Phase.ABORTED, Phase.LOST, Phase.FORGOTTEN}
    ),
    Phase.IN_DOUBT: frozenset({Phase.RESUMED, Phase.ABORTED, Phase.IN_DOUBT, Phase.LOST, Phase.FORGOTTEN}),
    Phase.LOST: frozenset(
        {Phase.LOST, Phase.RESUMED, Phase.FORGOTTEN}
    ),  # when asked again, the target may have whole images after all
    Phase.RESUMED: frozenset(),
    Phase.ABORTED: frozenset({Phase.ABORTED}),  # again when the target has been told
    Phase.FORGOTTEN: frozenset(),
}

FINAL = frozenset({Phase.RESUMED, Phase.ABORTED, Phase.FORGOTTEN})
OPEN = frozenset({Phase.COMMITTED, Phase.IN_DOUBT, Phase.LOST})  # at the source: `recover` has something to decide


def workload(phase: Phase | None, role: str = "source") -> str:
    """Return where the container is if a move stopped in `phase`: SOURCE, TARGET, NEITHER or UNKNOWN.

    `role` is the role of the host that recorded the phase. A target that holds whole images cannot know what the source
    has decided since, and it may have lost the line that says so.
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
