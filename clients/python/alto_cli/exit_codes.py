"""What the exit status of `alto` says, so that a script need not read messages."""

from __future__ import annotations

SUCCESS = 0
# The task failed, or ALTO did.
FAILURE = 1
# The user's input: an option, a file, a value that was refused. Also what the command line itself exits with.
USAGE = 2
NOT_FOUND = 3
# The state does not allow it: an ended task, a stale etag, a service that runs already.
CONFLICT = 4
# The credential is missing, wrong, or does not allow it.
PERMISSION = 5
QUOTA = 6
# The server cannot be reached, or did not answer in time.
UNREACHABLE = 7
# The task was cancelled.
CANCELLED = 8
INTERRUPTED = 130
