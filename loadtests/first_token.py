"""Time to refusal against time to first token, over HTTP: plain vLLM, the guarded engine, and the gateway.

Three servers side by side, one request at a time, the same prompts to each in rotating order. For plain vLLM
the clock stops at the first frame that holds a token; for a refusal at the first frame of the answer.
Wall-clock time: requests are sequential and everything runs on one machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from guard.sealed import Keyring
from loadtests.pairs import Interval

FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "32"),
    *("--max-num-seqs", "16", "--max-num-batched-tokens", "2048", "--num-gpu-blocks-override", "200"),
    *("--uvicorn-log-level", "warning", "--host", "127.0.0.1", "--served-model-name", "model"),
)
PLAIN = "from vllm.entrypoints.launchers.api_server.entry import main; main()"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def measure(model: Path, refusing: Path, prompts: list[list[int]], folder: Path) -> dict[str, Any]:
    """Seconds for each prompt at each server, and the two ratios to plain vLLM as intervals."""
    with contextlib.ExitStack() as running:
        start = running.enter_context
        keys = Path(start(tempfile.TemporaryDirectory())) / "keys"
        Keyring.generate().save(keys)
        python = sys.executable
        plain = start(
            server([python, "-c", PLAIN, "--model", str(model), *FLAGS], "/health", folder / "plain.log")
        )
        guarded = [python, "-m", "guard.engine", "--bundle", str(refusing), "--key-file", str(keys)]
        engine = start(
            server([*guarded, "--model", str(model), *FLAGS], "/guard/status", folder / "engine.log")
        )
        settings = {"NEURONGUARD_ENGINE_URL": engine, "NEURONGUARD_KEY_FILE": str(keys)}
        gateway = start(server([python, "-m", "service"], "/readyz", folder / "gateway.log", settings))
        urls = {"plain": plain, "engine": engine, "gateway": gateway}
        clients = {name: start(httpx.Client(base_url=url, timeout=60.0)) for name, url in urls.items()}
        for name, client in clients.items():
            for prompt in prompts[:3]:
                _first_frame(client, prompt[::-1], refused=name != "plain")
        rows = []
        for index, prompt in enumerate(prompts):
            order = list(clients)[index % 3 :] + list(clients)[: index % 3]
            rows.append({n: _first_frame(clients[n], prompt, refused=n != "plain") for n in order})
    return {
        "engine": Interval.of([row["engine"] / row["plain"] for row in rows])._asdict(),
        "gateway": Interval.of([row["gateway"] / row["plain"] for row in rows])._asdict(),
        "plain_milliseconds": Interval.of([1e3 * row["plain"] for row in rows])._asdict(),
        "gateway_milliseconds": Interval.of([1e3 * row["gateway"] for row in rows])._asdict(),
        "seconds": rows,
    }


def _first_frame(client: httpx.Client, prompt: list[int], *, refused: bool) -> float:
    body = {
        "model": "model",
        "prompt": prompt,
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    began = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        frames = answer.iter_lines()
        first = json.loads(next(frames).removeprefix("data: "))
        elapsed = time.perf_counter() - began
        silent = first["choices"][0].get("stop_reason") == "guard:refused"
        if refused != (silent or answer.headers.get("x-guard-action") == "refuse"):
            raise SystemExit(
                "the benchmark expected every prompt to be refused by the guard, and by it alone"
            )
        for _ in frames:
            pass
    return elapsed


@contextlib.contextmanager
def server(
    command: list[str], ready: str, log: Path, settings: dict[str, str] | None = None
) -> Iterator[str]:
    """Start a server on a free port, wait until ``ready`` answers 200, and give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, **ENVIRONMENT, **(settings or {}), "NEURONGUARD_PORT": port}
    arguments = command if settings else [*command, "--port", port]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        child = subprocess.Popen(
            arguments, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        for _ in range(1200):
            if child.poll() is not None:
                raise SystemExit(f"a server of the benchmark ended; see {log}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url + ready, timeout=2.0).status_code == 200:
                    break
            time.sleep(0.2)
        else:
            raise SystemExit(f"a server of the benchmark did not become ready; see {log}")
        yield url
    finally:
        child.terminate()
        child.wait(60)
