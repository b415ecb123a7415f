"""Read which mappings the dumped processes have.

mm-PID.img    one mm_entry {vmas = 14: vma_entry {start = 1, end = 2, flags = 6, status = 7}} (images/mm.proto,
              images/vma.proto)
"""

from typing import NamedTuple

from criu_rpc import pb

VSYSCALL, VDSO, VVAR = 1 << 2, 1 << 3, 1 << 12  # of `status` (criu/include/image.h)
_VMAS, _START, _END, _FLAGS, _STATUS = 14, 1, 2, 6, 7


class Mapping(NamedTuple):
    """One mapping; `flags` are those of mmap(2), `status` is CRIU's."""

    start: int
    end: int
    flags: int
    status: int


def read(images: int, pid: int) -> list[Mapping]:
    """Return the mappings of a process, in a directory behind a descriptor. Raises CriuError, OSError."""
    found = []
    for entry in pb.entries(pb.read(images, f"mm-{pid}.img")):
        for number, _, value in pb.fields(entry):
            if number == _VMAS and isinstance(value, bytes):
                vma = pb.fields(value)
                found.append(Mapping(*(pb.value(vma, field) for field in (_START, _END, _FLAGS, _STATUS))))
    return found
