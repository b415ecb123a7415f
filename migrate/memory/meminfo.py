"""The memory of this host."""


def available(*, swap: bool = True) -> int:
    """Return the bytes that programs can have without swapping, and with `swap` the swap that is free."""
    with open("/proc/meminfo") as file:
        fields = {name: int(rest.split()[0]) << 10 for name, rest in (line.split(":") for line in file)}
    return fields["MemAvailable"] + (fields.get("SwapFree", 0) if swap else 0)
