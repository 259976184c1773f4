"""Entry point: `alto`, or `python -m alto_cli`."""

from __future__ import annotations

import os

from alto_cli.app import app


def main() -> None:
    """Run the command line."""
    # gRPC, imported later, would print every handshake that failed; the error tells it once, and in words.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    app()


if __name__ == "__main__":
    main()
