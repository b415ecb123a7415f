"""Where containers have their state."""

DEFAULT_ROOT = "/run/opencontainer/containers"  # the directory of container states, where nothing else is said
