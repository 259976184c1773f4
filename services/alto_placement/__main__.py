"""alto-placement: places tasks on nodes. Settings are ALTO_PLACEMENT_* variables (see `settings`)."""

from __future__ import annotations

import asyncio
import gc
import sys

from alto_common.configuration import SettingsError
from alto_common.logs import configure_logs
from alto_common.rpc.server import run_until_signal

from alto_placement.server import GARBAGE_THRESHOLDS, PlacementServer
from alto_placement.settings import PlacementSettings


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    try:
        settings = PlacementSettings.load()
        configure_logs(settings.log_format)
        gc.set_threshold(*GARBAGE_THRESHOLDS)
        asyncio.run(_serve(settings))
    except SettingsError as error:
        sys.exit(f"alto-placement: {error}")


async def _serve(settings: PlacementSettings) -> None:
    server = PlacementServer(settings)
    await run_until_signal(server.start, server.stop, "alto-placement")


if __name__ == "__main__":
    main()
