"""A gateway as a process of its own, with what it leaves behind: audit file, log, metrics."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.servers import free_port, process, wait_until


@dataclass(frozen=True)
class GatewayProcess:
    """A running gateway."""

    url: str
    child: subprocess.Popen[bytes]
    folder: Path

    @property
    def log(self) -> str:
        return (self.folder / "gateway.log").read_text()

    def audited(self) -> list[dict[str, Any]]:
        """The whole lines of the audit file."""
        return [json.loads(line) for line in (self.folder / "audit.jsonl").read_text().splitlines()]

    def ends(self) -> dict[str, dict[str, Any]]:
        """The last line about each request, by its id."""
        return {line["request_id"]: line for line in self.audited() if line["event"] == "end"}

    def answers(self) -> dict[str, dict[str, Any]]:
        """The line about each answer, by the request's id."""
        return {line["request_id"]: line for line in self.audited() if line["event"] == "answer"}

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=10).text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@contextmanager
def gateway_process(
    folder: Path, engine_url: str, key_file: Path, *, until: str = "/readyz", **settings: str
) -> Iterator[GatewayProcess]:
    """Run a gateway until the end of the block. ``settings`` are given by their names in small letters."""
    port = free_port()
    values = {
        "engine_url": engine_url,
        "key_file": str(key_file),
        "port": str(port),
        "audit_file": str(folder / "audit.jsonl"),
        "status_interval": "0.1",
        **settings,
    }
    environment = {f"NEURONGUARD_{name.upper()}": value for name, value in values.items()}
    log = folder / "gateway.log"
    with process([sys.executable, "-m", "service"], environment, log) as child:
        wait_until(f"http://127.0.0.1:{port}{until}", child, log, 120.0)
        yield GatewayProcess(f"http://127.0.0.1:{port}", child, folder)
