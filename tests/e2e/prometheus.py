"""Real Prometheus and Alertmanager servers with the committed configuration, pointed at other addresses."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.e2e.servers import free_port, process, wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules"
PROMETHEUS = shutil.which("prometheus")
ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
"""Debian's name and the project's own; None where there is neither, as above."""


@dataclass(frozen=True)
class Series:
    """One series of an instant query's result."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Prometheus:
    """The HTTP API of a running server. Every method raises AssertionError with Prometheus' own words."""

    url: str
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=30.0))

    def get(self, path: str, **parameters: str | float) -> Any:
        """``data`` of an answer under ``/api/v1``."""
        answer = self.client.get(f"{self.url}/api/v1/{path}", params=parameters)
        document = answer.json()
        assert document["status"] == "success", f"{document['errorType']}: {document['error']}"
        return document["data"]

    def query(self, expr: str, at: float | None = None) -> list[Series]:
        """The result of an instant query, at Unix time ``at`` or now."""
        data = self.get("query", query=expr, time=time.time() if at is None else at)
        if data["resultType"] == "scalar":
            return [Series({}, float(data["result"][1]))]
        return [Series(one["metric"], float(one["value"][1])) for one in data["result"]]

    def total(self, expr: str) -> float:
        """Sum of the values of an instant query now."""
        return sum(series.value for series in self.query(expr))

    def health(self) -> dict[str, str]:
        """``up`` or another word for each scrape job, which have one target each."""
        return {t["labels"]["job"]: t["health"] for t in self.get("targets")["activeTargets"]}

    def rules(self) -> list[dict[str, Any]]:
        """All rules with their state."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def alerts(self, state: str = "firing") -> set[str]:
        """Names of the alerts in a state."""
        return {a["labels"]["alertname"] for a in self.get("alerts")["alerts"] if a["state"] == state}

    def scraped(self, rounds: int = 2) -> None:
        """Return when every target has been scraped ``rounds`` times from now, so that all before is in."""
        for _ in range(rounds):
            start = time.time()
            eventually(partial(self._all_since, start), "the targets are scraped", 20.0)

    def _all_since(self, start: float) -> bool:
        return self.total("min(timestamp(up))") > start


def eventually(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Return as soon as ``condition`` holds; AssertionError if it does not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


def pointed_at(targets: Mapping[str, str]) -> dict[str, Any]:
    """The committed ``prometheus.yml`` with an address for each job, the rules' folder and 1 s intervals."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES / Path(pattern).name) for pattern in config["rule_files"]]
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    (alertmanager,) = config["alerting"]["alertmanagers"]
    alertmanager["static_configs"] = [{"targets": [targets["alertmanager"]]}]
    return config


@contextlib.contextmanager
def prometheus(gateway: str, engine: str, alertmanager: str, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes these addresses (``host:port``). Needs ``PROMETHEUS``."""
    assert PROMETHEUS is not None
    address, log = f"127.0.0.1:{free_port()}", folder / "prometheus.log"
    targets = {"gateway": gateway, "engine": engine, "alertmanager": alertmanager, "prometheus": address}
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(pointed_at(targets)))
    command = [
        *(PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder / 'prometheus'}"),
        *(f"--web.listen-address={address}", "--log.level=warn"),
        # An alert that fires before Prometheus has found the Alertmanager is sent again, by default in 1 min.
        "--rules.alert.resend-delay=1s",
    ]
    with process(command, {}, log) as child:
        wait_until(f"http://{address}/-/ready", child, log, 30.0)
        server = Prometheus(f"http://{address}")
        with server.client:
            yield server


@contextlib.contextmanager
def alertmanager(folder: Path) -> Iterator[str]:
    """An Alertmanager with the committed configuration; its address.

    Where there is none an address at which nobody answers: the target is down then, and alerts are not sent.
    """
    address, log = f"127.0.0.1:{free_port()}", folder / "alertmanager.log"
    if ALERTMANAGER is None:
        yield address
        return
    command = [
        *(ALERTMANAGER, f"--config.file={DEPLOY / 'alertmanager' / 'alertmanager.yml'}"),
        *(f"--storage.path={folder / 'alertmanager'}", f"--web.listen-address={address}"),
        "--cluster.listen-address=",
    ]
    with process(command, {}, log) as child:
        wait_until(f"http://{address}/-/ready", child, log, 30.0)
        yield address
