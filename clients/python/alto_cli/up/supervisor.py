"""Looks after the services' processes: starts them, notices deaths, restarts with a growing delay, stops in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from alto_cli.up.health import HealthProbe
from alto_cli.up.layout import ServiceSpec
from alto_cli.up.lock import ServiceStatus
from alto_cli.view.wording import duration_text

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 30.0
# A service that has run this long is taken to be well: the next death is restarted without delay piled up before.
WELL_AFTER_S = 60.0
STOP_TIMEOUT_S = 30.0
TAIL_LINES = 15

Tell = Callable[[str], None]


class Service:
    """One service and its process."""

    def __init__(self, spec: ServiceSpec, tell: Tell) -> None:
        self.spec = spec
        self.state = "stopped"
        self.detail = ""
        self.restarts = 0
        self._tell = tell
        self._process: subprocess.Popen[bytes] | None = None
        self._probe = HealthProbe(spec.address)
        self._started_at = 0.0
        self._restart_at = 0.0
        self._delay_s = FIRST_DELAY_S

    @property
    def status(self) -> ServiceStatus:
        """How it is now."""
        pid = self._process.pid if self._process and self._process.poll() is None else None
        return ServiceStatus(
            self.spec.name, self.state, self.spec.address, pid, self.restarts, str(self.spec.log), self.detail
        )

    def start(self) -> None:
        """Start the process. It has a session of its own: Ctrl-C in this terminal reaches `alto up` alone."""
        command = [sys.executable, "-m", "alto_cli.up.child", str(os.getpid()), self.spec.module]
        with self.spec.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **self.spec.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started_at = time.monotonic()
        self.state, self.detail = "starting", ""

    def look(self) -> None:
        """Find out how it is; start it again when its time has come."""
        now = time.monotonic()
        if self.state == "restarting":
            if now >= self._restart_at:
                self.restarts += 1
                self._tell(f"{self.spec.name}: restarting (number {self.restarts})")
                self.start()
            return
        if self._process is None:
            return
        code = self._process.poll()
        if code is not None:
            self._process = None
            self.state, self.detail = "ended", exit_words(code)
        elif self._probe.is_serving():
            self.state, self.detail = "serving", ""
        elif self.state == "serving":
            self.state = "not serving"

    def schedule_restart(self) -> None:
        """Start it again after a delay that doubles with each death, until it has been well for a minute."""
        now = time.monotonic()
        if now - self._started_at >= WELL_AFTER_S:
            self._delay_s = FIRST_DELAY_S
        self._restart_at = now + self._delay_s
        self.state = "restarting"
        end_of_log = "\n".join(self.end_of_log())
        self._tell(f"{self.spec.name} ended ({self.detail}); {end_of_log}")
        self._tell(f"{self.spec.name}: starting again in {duration_text(self._delay_s)}")
        self._delay_s = min(self._delay_s * 2, LONGEST_DELAY_S)

    def end_of_log(self) -> list[str]:
        """Return the last lines of its log, indented, below a line that names it."""
        try:
            with self.spec.log.open("rb") as log:
                log.seek(max(0, self.spec.log.stat().st_size - 16_384))
                lines = log.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
        except OSError as error:
            lines = [str(error)]
        return [f"the end of {self.spec.log}:", *(f"    {line}" for line in lines)]

    def stop(self) -> None:
        """Ask the process to end and wait; kill it, with what it started, when it does not."""
        self._probe.close()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._tell(f"{self.spec.name} does not stop after {duration_text(STOP_TIMEOUT_S)}: killing it")
                self.kill()
        self.state, self.detail = "stopped", ""

    def kill(self) -> None:
        """End the process, and what it started, at once."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Supervisor:
    """All services. `tell` receives sentences for the person in front."""

    def __init__(self, specs: Sequence[ServiceSpec], tell: Tell) -> None:
        self.services = [Service(spec, tell) for spec in specs]

    def start(self) -> None:
        """Start all of them; they wait for each other."""
        for service in self.services:
            service.start()

    def look(self) -> None:
        """Find out how all of them are."""
        for service in self.services:
            service.look()

    @property
    def all_serving(self) -> bool:
        """Whether all of them serve."""
        return all(service.state == "serving" for service in self.services)

    @property
    def ended(self) -> list[Service]:
        """Those whose process has ended and that nobody has scheduled yet."""
        return [service for service in self.services if service.state == "ended"]

    def stop(self, tell: Tell) -> None:
        """Stop all of them, in the opposite order: the node first, so that what it reports is still heard."""
        for service in reversed(self.services):
            tell(f"stopping {service.spec.name}")
            service.stop()

    def kill(self) -> None:
        """End all of them at once."""
        for service in self.services:
            service.kill()


def exit_words(code: int) -> str:
    """Return an exit status in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
