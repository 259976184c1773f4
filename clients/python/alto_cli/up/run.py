"""Running the services in this process until it is told to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from alto_cli import exit_codes
from alto_cli.client_file import ClientFile
from alto_cli.failures import CommandError
from alto_cli.up.layout import Layout
from alto_cli.up.lock import HomeLock, Status, holder, write_status
from alto_cli.up.screen import Screen
from alto_cli.up.supervisor import Supervisor

LOOK_EVERY_S = 0.5
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LocalServices:
    """The services of one home folder, from the lock to the last process. `timeout_s` bounds the start."""

    def __init__(self, layout: Layout, screen: Screen, timeout_s: float) -> None:
        self._layout = layout
        self._screen = screen
        self._timeout_s = timeout_s
        self._stopping = threading.Event()
        self._lock = HomeLock(layout.home)

    def run(self) -> None:
        """Start all, look after them until a signal, stop all. Raises `CommandError` when they cannot be started."""
        self._layout.prepare()
        if not self._lock.acquire():
            raise already_running(self._layout.home)
        try:
            self._layout.check_environment()
            self._layout.check_ports()
            token = self._layout.service_token()
            self._supervisor = Supervisor(self._layout.services(token), self._screen.tell)
            before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
            try:
                self._supervise(token)
            finally:
                self._supervisor.stop(self._screen.tell)
                self._show(ready=False)
                for number, handler in before.items():
                    signal.signal(number, handler)
        finally:
            (self._layout.home / "status.json").unlink(missing_ok=True)
            self._lock.release()

    def _supervise(self, token: str) -> None:
        for service in self._supervisor.services:
            _rotate(service.spec.log)
        self._supervisor.start()
        ready = False
        deadline = time.monotonic() + self._timeout_s
        while not self._stopping.is_set():
            self._supervisor.look()
            self._show(ready)
            if not ready:
                ready = self._become_ready(token, deadline)
            for service in self._supervisor.ended:
                service.schedule_restart()
            self._stopping.wait(LOOK_EVERY_S)

    def _become_ready(self, token: str, deadline: float) -> bool:
        """Return whether all serve for the first time; raise when one of them ends or takes too long."""
        if ended := self._supervisor.ended:
            service = ended[0]
            raise CommandError(
                f"{service.spec.name} could not be started ({service.detail})",
                *service.end_of_log(),
                exit_code=exit_codes.FAILURE,
            )
        if self._supervisor.all_serving and self._layout.local_key_file.exists():
            api_key = self._layout.local_key_file.read_text().strip()
            ClientFile(self._layout.admission, api_key, self._layout.placement, token).save(self._layout.home)
            self._screen.tell(f"ALTO is up at {self._layout.admission}; try: alto tune FILE.yaml")
            return True
        if time.monotonic() > deadline:
            late = [service for service in self._supervisor.services if service.state != "serving"]
            raise CommandError(
                f"{', '.join(service.spec.name for service in late) or 'admission'} not ready "
                f"after {self._timeout_s:.0f} s",
                *(f"its log: {service.spec.log}" for service in late),
                "wait longer with --timeout",
                exit_code=exit_codes.FAILURE,
            )
        return False

    def _show(self, ready: bool) -> None:
        services = tuple(service.status for service in self._supervisor.services)
        self._screen.update(services)
        write_status(self._layout.home, Status(os.getpid(), ready, services))

    def _on_signal(self, number: int, _frame: object) -> None:
        if self._stopping.is_set():
            # Asked twice: no more patience.
            self._supervisor.kill()
        self._stopping.set()


def already_running(home: Path) -> CommandError:
    """Return the error for a second `alto up` over one home folder."""
    return CommandError(
        f"the services of {home} run already (process {holder(home)})",
        "see them: alto status; stop them: alto down; or run others with another ALTO_HOME and --port-base",
        exit_code=exit_codes.CONFLICT,
    )


def _rotate(log: Path) -> None:
    """Keep the log of the run before under another name."""
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
