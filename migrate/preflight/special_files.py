"""What a user does about a special file that CRIU cannot carry, by its kind: few of them can simply be closed."""

import re

_BPF = (
    "have the program detach it: it belongs to this host's kernel. systemd does without where bpf(2) is denied: "
    "deny it in linux.seccomp (errno EPERM), and move with --allow seccomp"
)
# The kind as /proc/PID/fd has it after "anon_inode:", or as we call it -> what to do about it.
_REMEDIES = {
    r"bpf.*": _BPF,
    r"userfaultfd": "run the program without userfaultfd: only who handles its page faults here can go on with them",
    r"perf_event": "stop the profiler (perf) in the container",
    r"seccomp notify": "end the program that supervises system calls of others (SECCOMP_RET_USER_NOTIF), and them",
    r"secretmem": "run the program without secret memory (memfd_secret)",
    r"hugepages": "run the program without huge pages of memfd_create (MFD_HUGETLB); transparent ones are carried",
    r"landlock-ruleset": "close it: a rule set that is in force (landlock_restrict_self) is not needed any longer",
    r"fscontext|mountfd": "wait until the program has mounted what it is about to mount, or close it",
    r"kvm-.*": "end the virtual machine: move it by its own means",
}


def remedy(kind: str) -> str:
    """For `kind`, which may be in brackets; "" where closing it is all that can be said."""
    name = kind.removeprefix("anon_inode:").strip("[]")
    return next((text for pattern, text in _REMEDIES.items() if re.fullmatch(pattern, name)), "")
