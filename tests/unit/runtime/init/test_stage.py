"""What mount_setattr(2) is asked for, for the flags of mount(2) that a bundle's options stand for."""

import pytest

from runtime.init.stage import Change, _calls
from runtime.linux.mount_flags import (
    ATTR_ATIME,
    ATTR_NOATIME,
    ATTR_NODEV,
    ATTR_RDONLY,
    ATTR_STRICTATIME,
    MS_PRIVATE,
    MS_REC,
    MS_SLAVE,
    attributes,
)
from runtime.spec.mounts import parse_options

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("ro,nodev", (ATTR_RDONLY | ATTR_NODEV, 0)),
        ("ro,rw", (0, ATTR_RDONLY)),
        ("noatime", (ATTR_NOATIME, ATTR_ATIME)),
        ("noatime,strictatime", (ATTR_STRICTATIME, ATTR_ATIME)),
        ("relatime", (0, ATTR_ATIME)),
        ("atime", (0, ATTR_ATIME)),
        ("norelatime,nostrictatime,sync,rbind", (0, 0)),
    ],
)
def test_attributes(options: str, expected: tuple[int, int]) -> None:
    parsed = parse_options(tuple(options.split(",")))
    assert attributes(parsed.flags, parsed.cleared) == expected


def test_as_few_calls_as_possible() -> None:
    readonly = Change(flags=1, propagation=(MS_PRIVATE | MS_REC,))
    assert _calls(readonly, single=True) == [(ATTR_RDONLY, 0, False, MS_PRIVATE)]
    assert _calls(readonly, single=False) == [(ATTR_RDONLY, 0, False, 0), (0, 0, True, MS_PRIVATE)]
    both = Change(set=ATTR_RDONLY, propagation=(MS_SLAVE | MS_REC, MS_PRIVATE))
    assert _calls(both, single=False) == [(ATTR_RDONLY, 0, True, MS_SLAVE), (0, 0, False, MS_PRIVATE)]
    assert _calls(Change(), single=True) == []
