"""How long this package waits for CRIU, in seconds, before it gives up. The caller says it for dumps and restores."""

REQUEST_TIMEOUT = 20.0  # for the answer to a short request
CLOSE_TIMEOUT = 10.0  # for CRIU to undo what it did, or to take a request
REAP_TIMEOUT = 1.0  # for the exit status of a CRIU whose socket is closed
