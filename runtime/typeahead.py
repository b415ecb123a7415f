"""Forward to runtime.monitor.typeahead, for monitors of the version before: they import it only when they need it."""

from runtime.monitor.typeahead import *  # noqa: F403
