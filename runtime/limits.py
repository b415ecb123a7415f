"""How long the runtime waits, in seconds, before it gives up. Modules with long lists of other numbers keep those."""

# The life of a container.
CONTAINER_LOCK_TIMEOUT = 10.0  # for another verb that works on the container
NETWORK_CLAIM_TIMEOUT = 10.0  # for another verb that gives a container a network
HANDSHAKE_TIMEOUT = 60.0  # for each answer of an init or exec'ed process that is being set up
INIT_STEP_TIMEOUT = 120.0  # the other way round: for each answer of `create`
PROGRAM_TIMEOUT = 120.0  # for the init to become the container's program
CONNECT_TIMEOUT = 20.0  # for a Unix socket of the caller's, such as --console-socket
SECCOMP_AGENT_TIMEOUT = 10.0
DEATH_TIMEOUT = 30.0  # for killed processes to exit

# Its monitor.
MONITOR_START_TIMEOUT = 20.0
MONITOR_PING_TIMEOUT = 5.0  # while the container may be frozen elsewhere
MONITOR_EXIT_TIMEOUT = 10.0
ATTACH_TIMEOUT = 20.0

# Its cgroups.
CGROUP_REMOVE_TIMEOUT = 10.0
CGROUP_KILL_TIMEOUT = 2.0
FREEZER_TIMEOUT = 10.0
SYSTEMD_TIMEOUT = 30.0  # for an answer, or the end of a job
SCOPE_PLACE_TIMEOUT = 120  # after which the child that keeps a new scope from being empty exits by itself

# Its network.
NETLINK_TIMEOUT = 10.0
CARRIER_TIMEOUT = 0.5
SOCKDIAG_TIMEOUT = 5.0

# Dumps and restores.
MEMORY_PATIENCE = 5.0  # for the rest of the memory of a container that was restored lazily
DUMP_TIMEOUT = 600.0  # for runc's `checkpoint` and `restore`
RESUME_TIMEOUT = 30.0  # for CRIU, once it may resume the tree
CRIU_UNDO_TIMEOUT = 5.0  # for CRIU to undo a restore
LEEWAY_TIMEOUT = 1.0  # for CRIU to exit once it has resumed the container
THROTTLE_LOCK_TIMEOUT = 600.0  # for a verb that holds the lock of a container that was left throttled
GUARD_START_TIMEOUT = 20.0
GUARD_EXIT_TIMEOUT = 5.0
CRIU_RELEASE_TIMEOUT = 600.0  # a CRIU that lost its caller notices when it next has something to say
CRIU_CODE_TIMEOUT = 5.0  # for CRIU's code in a process to exit
UNFREEZABLE_PATIENCE = 2.0  # for a state that passes by itself
