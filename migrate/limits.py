"""How long moves and snapshots wait, in seconds, before they give up. The lab and the demo keep their own."""

# The source.
CONTAINER_LOCK_TIMEOUT = 5.0  # for another verb that works on the container
FINGERPRINT_TIMEOUT = 600.0  # for the target to read a root file system
CONFIRM_TIMEOUT = 10.0  # while the container is frozen
TRIAL_TIMEOUT = 60.0  # for a trial of the connection to be sent, and for the target to take it
ROUND_TIMEOUT = 6 * 3600.0  # for a round of memory to be sent, and for the target to store it
STREAM_OPEN_TIMEOUT = 10.0  # for more connections to be opened, and to reach the agent
INJECTION_TIMEOUT = 5.0  # for a process to be stopped and released; the injector may have to start first
INJECTOR_EXIT_TIMEOUT = 1.0
RESUME_TIMEOUT = 30.0  # for the target to resume the container, which has been killed at the source
ANSWER_GRACE = 2.0  # for the target to report itself what exceeded the deadline
SEED_TIMEOUT = 6 * 3600.0  # for files that are sent while the container runs
VERIFY_TIMEOUT = 600.0  # for the target to check them and to wait for its disks
SEED_STOP_TIMEOUT = 10.0  # for a thread that sends files to end
SEED_CONNECT_TIMEOUT = 10.0  # for a channel of the connection
RECONNECT_TIMEOUT = 30.0  # for a new connection to a target that did not confirm
SETTLE_TIMEOUT = 240.0  # the target may have to wait for another agent that settles the move
ABORT_TIMEOUT = 30.0  # for the target to abort a move
UNDO_TIMEOUT = 30.0  # for the target to undo its part
MONITOR_TIMEOUT = 10.0  # for the monitor of a container that has left
ASKING_STOP_TIMEOUT = 10.0  # for the process that asks about a move in doubt
ASKING_LOCK_TIMEOUT = 1.0  # for the container, in that process
DISCARD_TIMEOUT = 600.0  # for the target to remove what aborted moves have left
CANCEL_TIMEOUT = 60.0  # for a move to roll back, whose target may not answer
PASSING_PATIENCE = 2.0  # for what passes by itself, such as a connection that is about to be accepted

# The target.
VERDICT_PATIENCE = 1.0  # for the verdict, before the images go to the disk
KEEPER_START_TIMEOUT = 10.0
KEEPER_EXIT_TIMEOUT = 1.0  # for a keeper that was killed
KEEPER_DISK_TIMEOUT = 20.0  # for one that may wait for a disk
RESTORE_TIMEOUT = 120.0  # for a restore that nobody waits for in a freeze
OLD_AGENT_TIMEOUT = 20.0
SETTLE_LOCK_TIMEOUT = 60.0  # for another process that settles the same move
SEED_SILENCE = 6 * 3600.0  # of the source while it sends files
TRIAL_SILENCE = 60.0  # of the source in a trial of the connection
FROZEN_SILENCE = 30.0  # beyond the limit for the freeze: the source has to end the container, too
IMAGES_LOCK_TIMEOUT = 5.0  # for another process that has a move's images

# The page handler.
HANDLER_START_TIMEOUT = 10.0
HANDLER_LOAD_TIMEOUT = 20.0  # for it to read the images
HANDLER_EXIT_TIMEOUT = 5.0  # for killed ones
HANDLER_RETRY = 0.001  # for a thread of the container to wake, before its memory can be filled
HANDLER_PAUSE = 0.05  # where the container has no memory left, or the handler no descriptors

# Snapshots.
LOG_TIMEOUT = 2.0  # for a container's last output to reach its log

# Preflight.
TREES_TIMEOUT = 600.0  # for the target to compare what it has
FACTS_TIMEOUT = 60.0  # for the target to say what it can do

# Files and trees.
RECEIVER_EXIT_TIMEOUT = 10.0  # for killed processes that receive files
EXEC_TIMEOUT = 1.0  # for a process in the middle of execve(2), whose environment cannot be read
TMPFS_OPEN_TIMEOUT = 10.0  # for the process that opens a container's tmpfs mounts
STALL_TIMEOUT = 60.0  # for rsync to make progress
RSYNC_STOP_TIMEOUT = 10.0  # for an rsync that was told to end
RSYNC_STATUS_TIMEOUT = 3.0  # for its exit status
RSYNC_WORDS_TIMEOUT = 2.0  # for what the target says of a run that has failed: the container may be frozen

# Connections.
CONNECT_TIMEOUT = 15.0  # unless ssh_config says otherwise
SSH_CONFIG_TIMEOUT = 15.0  # Match exec runs commands, CanonicalizeHostname asks the DNS
KRL_TIMEOUT = 15.0  # for ssh-keygen to look into a list of revoked keys
LAST_SCAN_TIMEOUT = 30.0  # for the writes of a frozen container to be found
PAGES_CLOSE_TIMEOUT = 60.0  # for the thread that relays pages to end
CARRIER_CLOSE_TIMEOUT = 60.0  # for the thread that sends memory to end
AGENT_START_TIMEOUT = 30.0  # from the log-in to the agent's first words
CALL_TIMEOUT = 30.0  # for the answer to a call that does not say otherwise
SEND_TIMEOUT = 60.0  # in which the target must take some of what is sent
AGENT_SILENCE = 11.0  # two pulses of the agent's
