"""Orchestration: move a running container to another host, or freeze it to disk and bring it back."""

__version__ = "0.1.0"
