"""Run runtime/monitor/typeahead.py for monitors of the previous version, which import it as `runtime.typeahead`.

They do so when a move holds them. Their `runtime.monitor` is a module, so they cannot import from the package.
"""

import os
from importlib.machinery import SourceFileLoader

_path = os.path.join(os.path.dirname(__file__), "monitor", "typeahead.py")
exec(SourceFileLoader(__name__, _path).get_code(__name__))  # type: ignore[arg-type]
