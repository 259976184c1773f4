"""alto-node: trains what placement assigns to this host. Settings are ALTO_NODE_* variables (see `settings`)."""

from __future__ import annotations

import asyncio
import sys

from alto_common.configuration import SettingsError
from alto_common.logs import configure_logs
from alto_common.rpc.server import run_until_signal

from alto_training.server import NodeServer
from alto_training.settings import NodeSettings


def main() -> None:
    """Serve until SIGTERM or SIGINT, or until another process takes this node's id (status 3)."""
    try:
        settings = NodeSettings.load()
        configure_logs(settings.log_format)
        sys.exit(asyncio.run(_serve(settings)))
    except SettingsError as error:
        sys.exit(f"alto-node: {error}")


async def _serve(settings: NodeSettings) -> int:
    server = NodeServer(settings)
    serving = asyncio.create_task(run_until_signal(server.start, server.stop, "alto-node", lambda: server.facts))
    superseded = asyncio.create_task(server.superseded.wait())
    await asyncio.wait({serving, superseded}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        superseded.cancel()
        await serving
        return 0
    serving.cancel()
    await server.stop()
    return 3


if __name__ == "__main__":
    main()
