"""``python -m loadtests.gateway``: what the gateway adds, beside the backend directly and LiteLLM's proxy.

Backend, proxies and load are processes of their own on one machine. Latency is that of one client that sends
one request after another, to each server in turn, in blocks; what a proxy adds is the median over blocks of
the difference between its and the backend's own percentile. Requests a second and core are requests divided
by the CPU seconds of the proxy's process, which others on the machine disturb less than wall-clock time.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from guard.sealed import Keyring

LITELLM = """
model_list:
  - model_name: mock
    litellm_params: {{model: openai/mock, api_base: "{backend}/v1", api_key: none}}
litellm_settings: {{telemetry: false, drop_params: true}}
guardrails:
  - guardrail_name: mock
    litellm_params:
      {{guardrail: generic_guardrail_api, mode: pre_call, api_base: "{backend}", default_on: true}}
"""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    pid: int

    @property
    def cpu_seconds(self) -> float:
        """User and system time of its process so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def megabytes(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextlib.contextmanager
def running(command: list[str], port: int, path: str, log: Path, **environment: str) -> Iterator[Server]:
    """Start a server and wait until ``path`` answers 200."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("NEURONGUARD_") and "proxy" not in k.lower()
    }
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, env=kept | environment)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if child.poll() is not None:
                raise click.ClickException(f"{command[:3]} ended; see {log}")
            with contextlib.suppress(OSError), urllib.request.urlopen(url + path, timeout=5) as answer:
                if answer.status == 200:
                    break
            time.sleep(0.2)
        yield Server(url, child.pid)
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def load(server: Server, **wish: int) -> dict[str, Any]:
    """Run the load and add the server's own CPU time."""
    before = server.cpu_seconds
    command = [sys.executable, "-m", "loadtests.gateway.load", server.url, json.dumps(wish)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"cpu_seconds": server.cpu_seconds - before, "megabytes": server.megabytes}


def measure(servers: dict[str, Server], blocks: int, requests: int) -> dict[str, Any]:
    """Latency in alternating blocks, then throughput."""
    for server in servers.values():
        load(server, connections=1, requests=50)  # warm
    found: dict[str, Any] = {name: {"blocks": []} for name in servers}
    for block in range(blocks):
        names = list(servers)
        for name in names[block % len(names) :] + names[: block % len(names)]:
            found[name]["blocks"].append(load(servers[name], connections=1, requests=requests))
    for name, server in servers.items():
        own = found[name]
        own["failed"] = sum(block["failed"] for block in own["blocks"])
        for point in ("p50", "p99"):
            own[f"{point}_ms"] = 1000 * float(np.median([block[point] for block in own["blocks"]]))
            differences = [
                block[point] - direct[point]
                for block, direct in zip(own["blocks"], found["backend"]["blocks"], strict=True)
            ]
            own[f"added_{point}_ms"] = 1000 * float(np.median(differences))
        busy = load(server, connections=16, requests=requests * blocks)
        own["busy"] = busy
        own["failed"] += busy["failed"]
        own["requests_per_core_second"] = busy["count"] / max(busy["cpu_seconds"], 1e-9)
        own["requests_per_second"] = busy["count"] / busy["wall_seconds"]
    return found


def table(found: dict[str, Any], streamed: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| | p50 ms | p99 ms | added p50 | added p99 | requests/s | requests/s per core | MB | failed |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, own in found.items():
        cells = [f"{own[key]:.2f}" for key in ("p50_ms", "p99_ms", "added_p50_ms", "added_p99_ms")]
        cells += [f"{own['requests_per_second']:.0f}", f"{own['requests_per_core_second']:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {own['busy']['megabytes']:.0f} | {own['failed']} |")
    lines += [
        "",
        "| streams at one time | gaps | p50 ms | p99 | longest | failed | CPU s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, own in streamed.items():
        cells = [f"{1000 * own[key]:.0f}" for key in ("p50", "p99", "max")]
        cells += [str(own["failed"]), f"{own['cpu_seconds']:.1f}"]
        lines.append(f"| {own['streams']}, {name} | {own['count']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--blocks", default=5, help="Blocks of requests to each server.")
@click.option("--requests", default=300, help="Requests in a block.")
@click.option("--streams", default=1000, help="Streams at one time; 0 for none.")
@click.option(
    "--litellm", type=click.Path(path_type=Path), help="The command litellm of an installation with [proxy]."
)
@click.option("--pause-ms", default=1000, help="Between two chunks of a stream.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/gateway"), show_default=True)
def main(blocks: int, requests: int, streams: int, pause_ms: int, litellm: Path | None, out: Path) -> None:
    """Measure and print a table."""
    click.echo(run(blocks, requests, streams, pause_ms, litellm, out))


def run(
    blocks: int = 5,
    requests: int = 300,
    streams: int = 1000,
    pause_ms: int = 1000,
    litellm: Path | None = None,
    out: Path = Path("results/gateway"),
) -> str:
    """Measure, write ``gateway.json`` and ``gateway.md`` into ``out``, and return the second."""
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), stack.enter_context
        Keyring.generate().save(folder / "keys")
        ports = [_free_port() for _ in range(3)]
        mock = [sys.executable, "-m", "loadtests.gateway.mock", str(ports[0]), str(folder / "keys")]
        backend = start(running(mock, ports[0], "/health", folder / "mock.log"))
        gateway = start(
            running(
                [sys.executable, "-m", "service"],
                ports[1],
                "/readyz",
                folder / "gateway.log",
                NEURONGUARD_ENGINE_URL=backend.url,
                NEURONGUARD_KEY_FILE=str(folder / "keys"),
                NEURONGUARD_PORT=str(ports[1]),
                NEURONGUARD_MAX_CONNECTIONS="2048",
                NEURONGUARD_AUDIT_FILE=str(folder / "audit.jsonl"),
            )
        )
        servers = {"backend": backend, "gateway": gateway}
        if litellm is not None:
            (folder / "litellm.yaml").write_text(LITELLM.format(backend=backend.url))
            command = [str(litellm), "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1"]
            servers["LiteLLM"] = start(
                running(
                    [*command, "--port", str(ports[2])],
                    ports[2],
                    "/health/liveliness",
                    folder / "litellm.log",
                    LITELLM_LOG="ERROR",
                    LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY="true",
                )
            )
        found = measure(servers, blocks, requests)
        streamed = {
            name: load(servers[name], streams=streams, chunks=20, pause_ms=pause_ms)
            for name in ("backend", "gateway")
            if streams
        }
    facts = {"python": platform.python_version(), "cores": os.cpu_count(), "load": os.getloadavg()}
    text = table(found, streamed)
    out.mkdir(parents=True, exist_ok=True)
    document = {"facts": facts, "servers": found, "streams": streamed}
    (out / "gateway.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "gateway.md").write_text(text)
    return text


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


if __name__ == "__main__":
    main()
