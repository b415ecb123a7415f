"""What the kernel would answer: a seccomp filter run over one system call (kernel doc networking/filter.rst)."""

import struct

X86_64, X86, X32_BIT = 0xC000003E, 0x40000003, 0x40000000
AARCH64, ARM, RISCV64 = 0xC00000B7, 0x40000028, 0xC00000F3


def run(program: bytes, number: int, *args: int, arch: int = X86_64) -> int:
    """The 32 bits that `program`, an array of struct sock_filter, returns for the call."""
    data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, arch, 0, *(*args, 0, 0, 0, 0, 0, 0)[:6])
    code = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        operation, if_true, if_false, k = code[at]
        at += 1
        match operation:
            case 0x20:  # load a word
                (accumulator,) = struct.unpack_from("=I", data, k)
            case 0x54:  # and
                accumulator &= k
            case 0x05:  # jump
                at += k
            case 0x15:
                at += if_true if accumulator == k else if_false
            case 0x25:
                at += if_true if accumulator > k else if_false
            case 0x35:
                at += if_true if accumulator >= k else if_false
            case 0x45:  # any of the bits
                at += if_true if accumulator & k else if_false
            case 0x06:
                return int(k)
            case _:
                raise AssertionError(f"instruction {at - 1}: unexpected operation {operation:#x}")
