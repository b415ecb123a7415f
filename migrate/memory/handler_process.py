"""The page handler's two processes: a worker, and a standby that takes over when the worker is killed.

    agent ---- socket ----> worker ---- userfaultfds ----> the container's processes
                               |
                  one descriptor table, shared memory
                               |
                            standby   waits for the worker's end by a pidfd

When the last descriptor of a userfaultfd is closed, its missing pages read as zeros. So the two share one descriptor
table (clone(2) with CLONE_FILES): what a kill closes in one process stays open in the other, even a descriptor that the
kernel has made an instant ago for a fork of the container's. Whichever is killed, the other clones a new partner.
A process that is stopped stops the container where it misses memory, and goes on after SIGCONT.
"""

import contextlib
import os
import resource
import select
import signal
import time
from pathlib import Path
from typing import NoReturn

from migrate.memory import uffd
from migrate.memory.control import NONE, Control, Word
from migrate.memory.worker import READY, Worker, write_note
from runtime.linux import processes

_PATIENT_AFTER = 20  # takeovers, after which each waits a moment: something makes each worker fail
_WAIT = 0.1


class _Cloned(BaseException):
    """In a new standby: leave the worker's code."""


def main(argv: list[str]) -> NoReturn:
    """argv: directory of the images, path of the note, then descriptors: agent, listening socket, locked note.

    A fifth one has the digests of the images' blocks, if they are the source of the memory and not a store.
    """
    images, note, *numbers = argv
    os.umask(0o077)
    os.chdir("/")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    processes.outlive_shortage()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each process of the container takes one
    control = Control()
    for word, number in zip((Word.AGENT, Word.LISTENING, Word.NOTE, Word.DIGESTS), numbers, strict=False):
        control[word] = int(number)
        os.set_inheritable(int(number), False)
    write_note(control)
    try:
        _pair(control, Path(images), Path(note))
    finally:  # whatever is raised here: the other process takes over
        os._exit(1)


def _pair(control: Control, images: Path, note: Path) -> NoReturn:
    """Be the worker, or the standby and then the worker."""
    takeovers = 0
    while True:
        own = os.pidfd_open(os.getpid())
        worker = None
        try:
            if control[Word.STANDBY] != NONE:  # this process, as its killed worker knew it
                os.close(control[Word.STANDBY])
            _clone(control)
            worker = Worker(control, images, note)
            if not takeovers:
                with contextlib.suppress(OSError):
                    os.write(control[Word.AGENT], READY)
            _work(worker, control)
            _finish(control, note)
        except _Cloned:
            if worker is not None:
                worker.let_go()
            worker = None
        _await_exit(own)
        os.close(own)
        if control[Word.OVER]:  # the worker may have been killed before it could remove the note
            remove_note(control[Word.NOTE], note)
            os._exit(0)
        takeovers += 1
        if takeovers > _PATIENT_AFTER:
            time.sleep(_WAIT)


def _clone(control: Control) -> None:
    """Clone a standby. Raises _Cloned in it."""
    control[Word.STANDBY] = NONE
    pid = uffd.clone()
    if pid == 0:
        raise _Cloned
    control[Word.STANDBY] = os.pidfd_open(pid)


def _work(worker: Worker, control: Control) -> None:
    """Work until all is done; replace a standby that was killed."""
    worker.watch(control[Word.STANDBY])
    while not worker.is_over:
        standby = control[Word.STANDBY]
        if standby in worker.step():
            worker.forget(standby)
            os.waitid(os.P_PIDFD, standby, os.WEXITED)
            os.close(standby)
            _clone(control)
            worker.watch(control[Word.STANDBY])


def _finish(control: Control, note: Path) -> NoReturn:
    """Remove the note, unless it says what has failed, and exit, both."""
    control[Word.OVER] = 1
    if not control[Word.FAILED]:
        remove_note(control[Word.NOTE], note)
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(control[Word.STANDBY], signal.SIGKILL)
    os._exit(0)


def _await_exit(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()


def remove_note(fd: int, note: Path) -> None:
    """Remove the note behind a descriptor, unless another is in its place."""
    with contextlib.suppress(OSError):
        if fd != NONE and os.path.samestat(os.fstat(fd), os.stat(note)):
            os.unlink(note)
