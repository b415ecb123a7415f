"""Hosts on this machine: each with its own namespaces, files and sshd, linked by a bridge, to try moves between."""
