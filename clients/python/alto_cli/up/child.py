"""Becomes a service that ends when `alto up` does, however that ends: `python -m alto_cli.up.child PARENT MODULE`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask the kernel for SIGTERM on the parent's death, then become the service."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # The parent may have died before the kernel was asked.
    if os.getppid() != parent:
        sys.exit(1)
    os.execv(sys.executable, [sys.executable, "-m", module])


if __name__ == "__main__":
    main()
