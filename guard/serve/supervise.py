"""Start the services together, wait until all are ready, and stop all when one ends or the user says so."""

from __future__ import annotations

import http.client
import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import click

from guard.serve.children import Child, Service, Watchdog, adopt_orphans, stop_all
from guard.serve.progress import Progress

START_SECONDS = 600.0
"""Generous, for busy machines: a service that cannot start says so and ends by itself."""
GRACE_SECONDS = 15.0
_POLL_SECONDS = 0.25
_PROBE_SECONDS = 2.0


class StopSignals:
    """Counts the requests to stop: the first is polite, a second one means at once."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


class LogEcho:
    """Shows what the services write, a service's name before each line."""

    def __init__(self, children: Sequence[Child]) -> None:
        self._read = {child.log: (child.service.name, 0) for child in children}

    def show(self) -> None:
        """Print the whole lines that are new since the last call."""
        for log, (name, offset) in self._read.items():
            with log.open("rb") as file:
                file.seek(offset)
                block = file.read()
            whole = block[: block.rfind(b"\n") + 1]
            self._read[log] = (name, offset + len(whole))
            for line in whole.decode("utf-8", errors="replace").splitlines():
                click.echo(f"{name:>8} | {line}")


def probe(service: Service) -> tuple[bool, str]:
    """Whether a service is ready, and what it says about itself in ``detail`` if it is not."""
    # Not urllib: it would send even loopback requests to a configured proxy.
    connection = http.client.HTTPConnection(service.address, service.port, timeout=_PROBE_SECONDS)
    try:
        connection.request("GET", service.ready_path)
        answer = connection.getresponse()
        body = answer.read(65536)
    except (OSError, http.client.HTTPException):
        return False, "loading"
    finally:
        connection.close()
    if answer.status == http.client.OK:
        return True, "ready"
    try:
        detail = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError):
        detail = "starting"
    return False, detail if isinstance(detail, str) else "starting"


def supervise(
    services: Sequence[Service],
    ready_message: str,
    *,
    logs: Path,
    remove: Sequence[Path] = (),
    verbose: bool = False,
    start_seconds: float = START_SECONDS,
    grace: float = GRACE_SECONDS,
) -> int:
    """Run ``services`` until a signal or the end of one of them; returns the exit status for this process.

    ``remove`` names directories that have to go even if this process is killed.
    """
    signals = StopSignals()
    adopt_orphans()
    logs.mkdir(parents=True, exist_ok=True)
    children: list[Child] = []
    with ExitStack() as cleanup:
        watchdog = cleanup.enter_context(Watchdog(grace))
        for folder in remove:
            watchdog.tell("remove", folder)
        cleanup.callback(_stop, children, grace, signals)
        for service in services:
            children.append(Child(service, logs / f"{service.name}.log", watchdog))
        echo = LogEcho(children) if verbose else None
        outcome = _wait_ready(children, signals, start_seconds, echo)
        if outcome is None:
            click.echo(ready_message)
            outcome = _wait_end(children, signals, echo)
        return outcome


def _wait_ready(
    children: Sequence[Child], signals: StopSignals, seconds: float, echo: LogEcho | None
) -> int | None:
    """None when all are ready, else the exit status."""
    progress = Progress(live=sys.stdout.isatty() and echo is None)
    try:
        while not signals.count:
            if _report_death(children, progress):
                return 1
            waiting = _first_unready(children)
            if waiting is None:
                progress.close()
                click.echo(f"Ready after {progress.seconds:.0f} s.")
                return None
            if progress.seconds > seconds:
                progress.close()
                where = children[0].log.parent
                click.echo(f"Not ready after {seconds:.0f} s ({waiting}); the logs are in {where}.", err=True)
                return 1
            if echo:
                echo.show()
            else:
                progress.update(waiting)
            time.sleep(_POLL_SECONDS)
    finally:
        progress.close()
    return 0


def _first_unready(children: Sequence[Child]) -> str | None:
    """The first service that is not ready, with what it says. Later ones may only be waiting for it."""
    for child in children:
        ready, detail = probe(child.service)
        if not ready:
            return f"{child.service.name}: {detail}"
    return None


def _wait_end(children: Sequence[Child], signals: StopSignals, echo: LogEcho | None) -> int:
    while not signals.count:
        if _report_death(children):
            return 1
        if echo:
            echo.show()
        time.sleep(_POLL_SECONDS)
    return 0


def _report_death(children: Sequence[Child], progress: Progress | None = None) -> bool:
    """Whether a child has ended; if so, show the end of its log."""
    for child in children:
        code = child.poll()
        if code is None:
            continue
        if progress:
            progress.close()
        for line in child.last_lines():
            click.echo(f"{child.service.name:>8} | {line}", err=True)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        click.echo(f"The {child.service.name} {how}; its whole log is {child.log}.", err=True)
        return True
    return False


def _stop(children: Sequence[Child], grace: float, signals: StopSignals) -> None:
    if signals.count:
        click.echo("Stopping.")
    before = signals.count
    for child in stop_all(children, grace, hurry=lambda: signals.count > max(before, 1)):
        click.echo(f"The {child.service.name} (process {child.pid}) could not be stopped.", err=True)
