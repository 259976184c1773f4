"""What `alto up`, `alto down` and `alto status` do."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import typer

from alto_cli import exit_codes
from alto_cli.client_file import home_folder
from alto_cli.failures import CommandError
from alto_cli.output import print_json, print_table, say
from alto_cli.up.layout import Layout
from alto_cli.up.lock import Status, holder, read_status

POLL_S = 0.1


def up(port_base: int, detach: bool, timeout_s: float, json_output: bool) -> None:
    """Start the services here, or with `detach` in a process of their own."""
    missing = [name for name in ("grpc_health", "sqlalchemy", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"running the services needs their parts, and {', '.join(missing)} is not installed",
            "install them: pip install 'alto-tuning[server,training]'",
        )
    layout = Layout(home_folder().resolve(), port_base)
    if detach:
        _detach(layout, timeout_s, json_output)
        return
    from alto_cli.up.run import LocalServices
    from alto_cli.up.screen import screen

    with screen(json_output) as shown:
        LocalServices(layout, shown, timeout_s).run()


def down(timeout_s: float, json_output: bool) -> None:
    """Stop the services and wait until they have ended."""
    home = home_folder().resolve()
    pid = holder(home)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while holder(home) is not None:
            if time.monotonic() > deadline:
                raise CommandError(
                    f"process {pid} is still stopping its services after {timeout_s:.0f} s",
                    "wait longer with --timeout, or see `alto status`",
                    exit_code=exit_codes.FAILURE,
                )
            time.sleep(POLL_S)
    if json_output:
        print_json({"stopped": pid})
    else:
        say("stopped" if pid is not None else "nothing runs here")


def status(json_output: bool) -> None:
    """Show the services; the exit code tells whether all of them serve."""
    home = home_folder().resolve()
    noted = read_status(home) if holder(home) is not None else None
    if noted is None:
        if json_output:
            print_json({"running": False, "services": []})
        else:
            say("nothing runs here; start it: alto up")
        raise typer.Exit(exit_codes.UNREACHABLE)
    current = _probed(noted)
    if json_output:
        print_json({"running": True, **asdict(current)})
    else:
        rows = [[one.name, one.state, one.address, str(one.pid or "-"), one.log] for one in current.services]
        print_table(["service", "state", "address", "pid", "log"], rows, empty="no services")
    if any(service.state != "serving" for service in current.services):
        raise typer.Exit(exit_codes.FAILURE)


def _probed(noted: Status) -> Status:
    """Return a status with each service asked once more: what was noted may be a moment old."""
    from alto_cli.up.health import HealthProbe

    services = []
    for service in noted.services:
        probe = HealthProbe(service.address)
        serves = probe.is_serving()
        probe.close()
        state = "serving" if serves else "not serving" if service.state == "serving" else service.state
        services.append(replace(service, state=state))
    return replace(noted, services=tuple(services))


def _detach(layout: Layout, timeout_s: float, json_output: bool) -> None:
    """Start `alto up` in a session of its own and wait until all serve. Running already is as good."""
    log = layout.home / "logs" / "up.log"
    if holder(layout.home) is None:
        layout.prepare()
        command = [sys.executable, "-m", "alto_cli", "up", "--port-base", str(layout.port_base)]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*command, "--timeout", str(timeout_s)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
            )
        _wait_until_ready(layout.home, process, log)
        # It goes on without us: nothing is to be waited for, nor warned about, when this process ends.
        process.returncode = 0
    noted = read_status(layout.home)
    if json_output:
        print_json({"running": True, **(asdict(noted) if noted else {})})
    else:
        services = ", ".join(f"{one.name} {one.address}" for one in noted.services) if noted else ""
        say(f"ALTO is up ({services}); stop it: alto down")


def _wait_until_ready(home: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the status that says so; raise `CommandError` with the reason when the process ends before."""
    while True:
        noted = read_status(home)
        if noted is not None and noted.pid == process.pid and noted.ready:
            return
        if (code := process.poll()) is not None:
            lines = log.read_text(errors="replace").strip().splitlines()
            error = next((i for i, line in enumerate(lines) if line.startswith("error: ")), max(0, len(lines) - 1))
            told = [line.removeprefix("error: ").removeprefix("  ") for line in lines[error:]]
            text, *cures = told or ["alto up ended"]
            raise CommandError(text, *cures, exit_code=code or exit_codes.FAILURE)
        time.sleep(POLL_S)
