"""How tracking the writes of a process fails, whatever tracks them."""


class TrackingFailed(Exception):
    """Writes of a process cannot be tracked; `str` says why."""


class Gone(Exception):
    """The address space does not exist any longer: the process has exited, or has executed another program."""


ASYNCHRONOUS = "it reads files asynchronously and with O_DIRECT, so that devices write its memory"
