"""`python -m alto_admission` serves; `python -m alto_admission keys create|list|revoke` administers API keys.

$ alto-admission keys create --tenant acme --scopes read,write --days 90
key-5f0c9a21
alto_Zx...                      (shown this once)
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from datetime import UTC, datetime

from alto_common.configuration import SettingsError
from alto_common.errors import DomainError

MOST_DAYS = 36_500


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _serve() if options.command is None else asyncio.run(_keys(options))
    except SettingsError as error:
        print(f"alto-admission: {error}", file=sys.stderr)
        return 1
    except DomainError as error:
        print(error.message, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alto-admission", description="Serve the public API; settings are variables ALTO_ADMISSION_*."
    )
    commands = parser.add_subparsers(dest="command")
    administration = commands.add_parser(
        "keys", help="administer API keys", description="Administer API keys; needs the database alone."
    )
    keys = administration.add_subparsers(dest="action", required=True)
    create = keys.add_parser("create", help="make a key and show it once")
    create.add_argument("--tenant", required=True)
    create.add_argument("--scopes", default="read,write", help="read, write or both, separated by a comma")
    create.add_argument("--days", type=_days, help="days until it expires; never when left out")
    listing = keys.add_parser("list", help="list keys, without the keys themselves")
    listing.add_argument("--tenant")
    revoke = keys.add_parser("revoke", help="revoke one key of a tenant, or all of them")
    revoke.add_argument("--tenant", required=True)
    revoke.add_argument("--key", help="the key's id; all of the tenant's keys when left out")
    return parser


def _days(text: str) -> float:
    days = float(text)
    if not 0 < days <= MOST_DAYS:
        raise argparse.ArgumentTypeError(f"give a number above 0, at most {MOST_DAYS:,}, or leave it out")
    return days


def _serve() -> int:
    from alto_common.logs import configure_logs
    from alto_common.rpc.server import run_until_signal

    from alto_admission.server import AdmissionServer
    from alto_admission.settings import AdmissionSettings

    settings = AdmissionSettings.load()
    configure_logs(settings.log_format)

    async def serve() -> None:
        server = AdmissionServer(settings)
        await run_until_signal(server.start, server.stop, "alto-admission")

    asyncio.run(serve())
    return 0


async def _keys(options: argparse.Namespace) -> int:
    from alto_common.configuration import DATABASE_CURE

    from alto_admission.api_keys import new_key
    from alto_admission.server import clock_us, open_database
    from alto_admission.settings import AdmissionSettings
    from alto_admission.store.keys import KeyStore

    # Keys are between an operator and the database: the services' token plays no part.
    settings = AdmissionSettings.load(service_token="none")
    database = open_database(settings)
    keys = KeyStore(database)
    try:
        with settings.needed("database_url", DATABASE_CURE):
            await database.migrate()
        if options.action == "create":
            expire_us = None if options.days is None else clock_us() + int(options.days * 86_400e6)
            secret, kept = new_key(options.tenant, options.scopes.split(","), clock_us(), expire_us)
            await keys.add(kept)
            print(f"{kept.key_id}\n{secret}")
        elif options.action == "revoke":
            print(f"{await keys.revoke(options.tenant, options.key)} revoked")
        else:
            for key in await keys.all(options.tenant):
                state = "revoked" if key.revoked else f"until {_day(key.expire_us)}" if key.expire_us else "active"
                print(f"{key.key_id}\t{key.tenant}\t{key.scopes}\tsince {_day(key.create_us)}\t{state}")
    finally:
        await database.close()
    return 0


def _day(time_us: int) -> str:
    return datetime.fromtimestamp(time_us / 1e6, UTC).date().isoformat()


if __name__ == "__main__":
    sys.exit(main())
