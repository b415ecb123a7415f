"""The table of which call is allowed when, and the one place that looks it up.

A stage is where the conversation of one connection is. A call is allowed in some stages, and leads to another one or
leaves the conversation where it is. One that would have led on and fails leads to FAILED: the source may only abort
then. What it had sent before it heard of the failure (Image, ImageEnd, DATA, PAGES) is ignored.
"""

import enum
import re
from typing import Any

from migrate.errors import ProtocolError
from migrate.wire import protocol
from migrate.wire.frames import FrameType
from migrate.wire.protocol import Call
from runtime.light.records import Record


class Stage(enum.StrEnum):
    """Where a conversation is, in words that fit after "the conversation is at"."""

    CONNECTED = "its start"  # no Hello yet
    GREETED = "hello"  # no move of this connection yet
    TRIAL = "the trial of the connection"  # TrialBegin: memory that comes is thrown away
    SEEDING = "the files"  # OpenBundle: files come over channels of their own
    READY = "the wait for the freeze"  # Prepare: all is made that a restore needs
    PAGES = "the memory pages"
    IMAGES = "the images"  # PagesEnd
    IMAGE = "an image"
    HELD = "the verdict"  # Restore: restored, nothing has run
    RUNNING = "the end"  # Resume: the container runs here
    ABORTED = "its end, as the move was aborted"
    FAILED = "a call that failed"
    DECIDED = "its end, as the source has ended the container"  # Resume has failed: a new connection settles the move


class Step(Record):
    """Stages in which a call is allowed, and the stage after it; None: the same. `failed`: that after a failure."""

    allowed: frozenset[Stage]
    then: Stage | None
    failed: Stage | None


def _step(*allowed: Stage, then: Stage | None = None, failed: Stage = Stage.FAILED) -> Step:
    return Step(frozenset(allowed), then, failed if then is not None else None)


_UNDECIDED = frozenset(Stage) - {Stage.CONNECTED, Stage.DECIDED, Stage.RUNNING}
ORDER: dict[type[Call[Any]], Step] = {
    protocol.Hello: _step(Stage.CONNECTED, then=Stage.GREETED),
    protocol.Facts: _step(Stage.GREETED),
    protocol.CheckPorts: _step(Stage.GREETED),
    protocol.CheckTrees: _step(Stage.GREETED),
    protocol.CheckFiles: _step(Stage.GREETED),
    protocol.Discard: _step(Stage.GREETED),
    protocol.Settle: _step(Stage.GREETED),
    protocol.TrialBegin: _step(Stage.GREETED, then=Stage.TRIAL),
    protocol.TrialEnd: _step(Stage.TRIAL, then=Stage.GREETED),
    protocol.OpenBundle: _step(Stage.GREETED, then=Stage.SEEDING),
    protocol.BundleSent: _step(Stage.SEEDING),
    protocol.TreesSent: _step(Stage.SEEDING),
    protocol.Prepare: _step(Stage.SEEDING, then=Stage.READY),
    protocol.MemoryBegin: _step(Stage.READY),
    protocol.MemoryStreams: _step(Stage.READY),
    protocol.MemorySync: _step(Stage.READY, Stage.TRIAL),
    protocol.MemoryEnd: _step(Stage.IMAGES),
    protocol.PagesBegin: _step(Stage.READY, then=Stage.PAGES),
    protocol.PagesEnd: _step(Stage.PAGES, then=Stage.IMAGES),
    protocol.Image: _step(Stage.IMAGES, then=Stage.IMAGE),
    protocol.ImageEnd: _step(Stage.IMAGE, then=Stage.IMAGES),
    protocol.Restore: _step(Stage.IMAGES, then=Stage.HELD),
    protocol.Confirm: _step(Stage.HELD),
    protocol.Resume: _step(Stage.HELD, then=Stage.RUNNING, failed=Stage.DECIDED),
    protocol.History: _step(Stage.RUNNING),
    protocol.Abort: _step(*_UNDECIDED, then=Stage.ABORTED),
}
STREAMED = {
    FrameType.PAGES: frozenset({Stage.PAGES}),
    FrameType.DATA: frozenset({Stage.IMAGE}),
    FrameType.MEMORY: frozenset({Stage.TRIAL, Stage.READY, Stage.PAGES, Stage.IMAGES, Stage.IMAGE}),
}
_IGNORED = (protocol.Image, protocol.ImageEnd)


def method_of(cls: type[Call[Any]]) -> str:
    """The name of the method that carries a call out: `open_bundle` for OpenBundle."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


class Progress:
    """The stage of one conversation, as the target sees it."""

    def __init__(self) -> None:
        self.stage = Stage.CONNECTED

    def admit(self, call: Call[Any]) -> bool:
        """Return whether to carry a call out, False to ignore it. Raises ProtocolError when it is out of order."""
        if self.stage is Stage.FAILED and isinstance(call, _IGNORED):
            return False
        if self.stage not in ORDER[type(call)].allowed:
            raise ProtocolError(f"{type(call).__name__} is out of order: the conversation is at {self.stage}")
        return True

    def admit_frame(self, kind: FrameType) -> bool:
        """The same for a frame that is not a call."""
        if self.stage is Stage.FAILED and kind in STREAMED:
            return False
        if self.stage not in STREAMED.get(kind, ()):
            raise ProtocolError(f"a {kind.name} frame is out of order: the conversation is at {self.stage}")
        return True

    def done(self, call: Call[Any]) -> None:
        """A call was carried out."""
        self.stage = ORDER[type(call)].then or self.stage

    def failed(self, call: Call[Any]) -> None:
        """A call failed."""
        self.stage = ORDER[type(call)].failed or self.stage
