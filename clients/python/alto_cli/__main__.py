"""Entry point: `alto`, or `python -m alto_cli`."""

from __future__ import annotations

from alto_cli.app import app


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
