"""The config.json that is kept with a container's state."""

from __future__ import annotations

import os

from runtime.errors import unwritable
from runtime.light import json as light_json
from runtime.spec.config import CONFIG, Spec, in_force, load_bundle, parse, read_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.state.record import State


def keep(spec: Spec, directory: str) -> None:
    """Write a new container's config.json into its directory; see `load_kept`. Raises ContainerError."""
    path = os.path.join(directory, CONFIG)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(light_json.dumps(spec.config))
    except OSError as error:
        raise unwritable(path, error) from None


def load_kept(state: State) -> Spec:
    """Return the spec of an existing container. Raises SpecError.

    Later changes in its bundle must not affect the container (runtime.md, lifecycle).
    """
    path = os.path.join(state.directory, CONFIG)
    kept = os.path.exists(path)  # earlier versions did not keep it
    spec = parse(read_json(path, ""), state.bundle) if kept else load_bundle(state.bundle)
    return in_force(spec, state.annotations, None)
