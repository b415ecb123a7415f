"""Make hosts on this machine to try moves: each has its own namespaces, files and sshd; a bridge links them."""
