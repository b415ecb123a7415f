"""A compact OCI runtime: one container on one host."""
