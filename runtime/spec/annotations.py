"""The annotations of a config.json that this runtime reads."""

NET = "io.pymigrate.net"  # the network of a container (network.py)
CRIU_CONFIG = "org.criu.config"  # runc's: a configuration file for CRIU
