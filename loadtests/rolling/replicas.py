"""Two engines and two gateways on this machine, each of which can be stopped and started in its place."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from guard.sealed import Keyring
from guard.verdict import STATUS_PATH, EngineStatus

START_SECONDS = 300.0
STOP_SECONDS = 90.0


class RollingError(RuntimeError):
    """A replica did not do what it was waited for."""


@dataclass(frozen=True)
class Choice:
    """What an engine is started with; a rolling change is another one."""

    bundle: str
    """Directory of the bundle; a fake engine takes its digest."""
    python: str = sys.executable


Command = Callable[[Choice, Path, int], list[str]]
"""From a choice, the key file and a port to the command line of an engine."""


class Child(Protocol):
    """What is used of ``subprocess.Popen``."""

    pid: int

    def poll(self) -> int | None:
        """The exit status, None while it runs."""

    def send_signal(self, sig: int) -> None:
        """To the process itself."""

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""


Start = Callable[[list[str], Mapping[str, str], Path], Child]
"""Starts a command with further variables in its environment, in a process group of its own."""


def popen(command: list[str], environment: Mapping[str, str], log: Path) -> Child:
    """The ordinary ``Start``."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command, env=os.environ | environment, stdout=file, stderr=file, start_new_session=True
        )


class Replica:
    """One process that listens on a port of its own."""

    def __init__(self, name: str, path: str, folder: Path, start: Start = popen) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.name = name
        self.url = f"http://127.0.0.1:{self.port}"
        self._path = path
        self._log = folder / f"{name}.log"
        self.environment: dict[str, str] = {}
        self.process: Child | None = None
        self._start = start

    def start(self, command: list[str]) -> None:
        """Start it; it is not waited for."""
        self.process = self._start(command, self.environment, self._log)

    def wait_ready(self) -> None:
        """Until it says that it answers. Raises RollingError."""
        assert self.process is not None
        with httpx.Client(timeout=10) as client:
            deadline = time.monotonic() + START_SECONDS
            while time.monotonic() < deadline and self.process.poll() is None:
                with contextlib.suppress(httpx.HTTPError):
                    if client.get(self.url + self._path).status_code == 200:
                        return
                time.sleep(0.1)
        said = self._log.read_text("utf-8", "replace")[-2000:]
        raise RollingError(f"{self.name} is not ready (exit status {self.process.poll()}): {said}")

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to the process itself, not to its children."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait_gone(self) -> None:
        """Until it has ended. Raises RollingError."""
        assert self.process is not None
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise RollingError(
                f"{self.name} did not stop in {STOP_SECONDS:.0f} s; see {self._log}"
            ) from error

    def kill(self) -> None:
        """Whatever is left of it."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


@dataclass
class Deployment:
    """The replicas and the files that they share."""

    folder: Path
    command: Command
    choice: Choice
    policies: dict[str, object]
    engines: list[Replica] = field(default_factory=list)
    gateways: list[Replica] = field(default_factory=list)

    @property
    def key_file(self) -> Path:
        """The key ring of all replicas."""
        return self.folder / "guard.keys"

    @property
    def policy_file(self) -> Path:
        """The policies of both gateways."""
        return self.folder / "policies.yaml"

    def write_keys(self, *rings: Keyring) -> None:
        """One ring with the keys of all, in this order. Takes effect when a replica starts."""
        new = self.folder / "new.keys"
        Keyring(tuple(key for ring in rings for key in ring.keys)).save(new)
        new.replace(self.key_file)

    def write_policies(self, **changes: object) -> None:
        """Other policies, as one whole file. Takes effect within seconds, or when a gateway starts."""
        self.policies = self.policies | changes
        new = self.folder / "policies.new"
        new.write_text(yaml.safe_dump(self.policies))
        new.replace(self.policy_file)

    def choose(self, **changes: str) -> None:
        """What engines are started with from now on."""
        self.choice = replace(self.choice, **changes)

    def start_engine(self, engine: Replica) -> None:
        """Start it; it is not waited for."""
        engine.start(self.command(self.choice, self.key_file, engine.port))

    @staticmethod
    def start_gateway(gateway: Replica) -> None:
        """Start it; it is not waited for."""
        gateway.start([sys.executable, "-m", "service"])

    def status(self, engine: Replica) -> EngineStatus:
        """What an engine says of itself."""
        return EngineStatus.model_validate_json(httpx.get(engine.url + STATUS_PATH, timeout=10).content)

    def metric(self, gateway: Replica, name: str, **labels: str) -> float:
        """The sum of a gateway's samples with these labels."""
        return total(httpx.get(gateway.url + "/metrics", timeout=10).text, name, **labels)

    def wait_seen(self, engine: Replica, up: bool) -> None:
        """Until every gateway knows that an engine takes requests, or that it takes none.

        Raises RollingError.
        """
        backend = engine.url.removeprefix("http://")
        for gateway in self.gateways:
            deadline = time.monotonic() + 30
            while self.metric(gateway, "guard_upstream_up", backend=backend) != up:
                if time.monotonic() > deadline:
                    raise RollingError(
                        f"{gateway.name} does not see that {engine.name} is {'up' if up else 'down'}"
                    )
                time.sleep(0.05)

    def change_policies(self, **changes: object) -> None:
        """Other policies, in force at every gateway when this returns. Raises RollingError."""
        before = [self._reloads(gateway) for gateway in self.gateways]
        self.write_policies(**changes)
        for gateway, reloads in zip(self.gateways, before, strict=True):
            deadline = time.monotonic() + 30
            while self._reloads(gateway) == reloads:
                if time.monotonic() > deadline:
                    raise RollingError(f"{gateway.name} has not taken over the policies")
                time.sleep(0.05)

    def _reloads(self, gateway: Replica) -> float:
        return self.metric(gateway, "guard_policy_reloads_total", result="done")


def total(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels in what a ``/metrics`` route says."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@contextlib.contextmanager
def deployed(
    folder: Path,
    command: Command,
    choice: Choice,
    keys: Keyring,
    policies: dict[str, object],
    *,
    replicas: int = 2,
    environment: Mapping[str, str] | None = None,
    drain: float = 1.0,
    interval: float = 0.5,
    start: Start = popen,
) -> Iterator[Deployment]:
    """Start everything and wait until it answers; nothing is left of it afterwards.

    ``environment`` is that of the engines, beside this process's own. ``drain`` and ``interval`` are seconds:
    how long a gateway goes on after a stop signal, more than twice the time between two looks of the load at
    ``/readyz``; and between two looks of gateways at engines and policies.
    """
    deployment = Deployment(folder, command, choice, {})
    deployment.write_keys(keys)
    deployment.write_policies(**policies)
    deployment.engines = [Replica(f"engine-{i}", STATUS_PATH, folder, start) for i in range(replicas)]
    deployment.gateways = [Replica(f"gateway-{i}", "/readyz", folder, start) for i in range(replicas)]
    engines = deployment.engines
    for engine in engines:
        engine.environment = dict(environment or {})
    for gateway in deployment.gateways:
        gateway.environment = {
            "NEURONGUARD_ENGINE_URL": ",".join(engine.url for engine in engines),
            "NEURONGUARD_KEY_FILE": str(deployment.key_file),
            "NEURONGUARD_POLICY_FILE": str(deployment.policy_file),
            "NEURONGUARD_POLICY_INTERVAL": str(interval),
            "NEURONGUARD_STATUS_INTERVAL": str(interval),
            "NEURONGUARD_DRAIN_DELAY": str(drain),
            "NEURONGUARD_PORT": str(gateway.port),
            "NEURONGUARD_AUDIT_FILE": str(folder / f"{gateway.name}.jsonl"),
        }
    try:
        for engine in engines:
            deployment.start_engine(engine)
        for gateway in deployment.gateways:
            deployment.start_gateway(gateway)
        for each in (*engines, *deployment.gateways):
            each.wait_ready()
        for engine in engines:
            deployment.wait_seen(engine, up=True)
        yield deployment
    finally:
        for each in (*deployment.gateways, *engines):
            each.kill()
