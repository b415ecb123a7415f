"""What is said about special files: by kind."""

import pytest

from migrate.preflight.special_files import remedy


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("anon_inode:bpf-prog", "linux.seccomp"),
        ("anon_inode:bpf-map", "bpf(2)"),
        ("anon_inode:bpf_link", "bpf(2)"),
        ("anon_inode:[userfaultfd]", "userfaultfd"),
        ("anon_inode:[perf_event]", "perf"),
        ("anon_inode:seccomp notify", "SECCOMP_RET_USER_NOTIF"),
        ("anon_inode:[landlock-ruleset]", "landlock_restrict_self"),
        ("anon_inode:[fscontext]", "mount"),
        ("anon_inode:kvm-vcpu:0", "virtual machine"),
        ("secretmem", "memfd_secret"),
        ("hugepages", "MFD_HUGETLB"),
    ],
)
def test_a_remedy_for_each_kind(kind: str, words: str) -> None:
    assert words in remedy(kind)


def test_of_an_unknown_kind_the_rule_says_all() -> None:
    assert remedy("anon_inode:[new-in-linux-9]") == ""
