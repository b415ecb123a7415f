"""The remedies for special files that CRIU cannot carry, by kind, because few of them can simply be closed."""

import re

_BPF = (
    "have the program detach it, because it belongs to this host's kernel. systemd works without it where bpf(2) is "
    "denied: deny it in linux.seccomp (errno EPERM), and move with --allow seccomp"
)
# The kind, as in /proc/PID/fd after "anon_inode:" or as this package calls it -> the remedy.
_REMEDIES = {
    r"bpf.*": _BPF,
    r"userfaultfd": "run the program without userfaultfd: the process that handles its page faults is needed there too",
    r"perf_event": "stop the profiler (perf) in the container",
    r"seccomp notify": "end the supervisor of system calls (SECCOMP_RET_USER_NOTIF) and its supervised programs",
    r"secretmem": "run the program without secret memory (memfd_secret)",
    r"hugepages": "run the program without huge pages of memfd_create (MFD_HUGETLB); transparent ones are carried",
    r"landlock-ruleset": "close it: once enforced (landlock_restrict_self), the rule set is not needed",
    r"fscontext|mountfd": "wait until the program has finished mounting, or close it",
    r"kvm-.*": "end the virtual machine, or move it with its own tools",
}


def remedy(kind: str) -> str:
    """Return the remedy for `kind`, which may be in brackets; "" if the rule's own remedy fits."""
    name = kind.removeprefix("anon_inode:").strip("[]")
    return next((text for pattern, text in _REMEDIES.items() if re.fullmatch(pattern, name)), "")
