"""The two real processes: a guarded vLLM API server and a gateway in front of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from guard.engine.forking import BIND_ENV, METHOD_ENV

ENGINE_FLAGS = (
    *("--dtype", "float32", "--max-model-len", "512", "--block-size", "32"),
    *("--max-num-seqs", "32", "--max-num-batched-tokens", "256", "--num-gpu-blocks-override", "300"),
    *("--uvicorn-log-level", "warning", "--enforce-eager"),
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
FORKED = {METHOD_ENV: "fork", BIND_ENV: "nobind"}
"""Starts faster, as ``make serve`` does; without it vLLM's CPU build imports everything three times."""
SET_HERE = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD")
"""What in-process engines set in this process, the second by vLLM itself when it is imported."""
API_KEYS = {name: f"sk-test-{name}" for name in ("message", "content_filter", "observe", "scored")}
POLICIES = {
    "policies": {
        "message": {},
        "content_filter": {"refusal": {"style": "content_filter", "text": "No."}},
        "observe": {"mode": "observe", "expose_score": True},
        "scored": {"expose_score": True},
    },
    "keys": [
        {"sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": "tests", "policy": name}
        for name, key in API_KEYS.items()
    ],
}


@dataclass(frozen=True)
class Stack:
    """Where to find the processes."""

    engine: str
    gateway: str
    log: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child in its own process group, which is gone afterwards."""
    inherited = {k: v for k, v in os.environ.items() if k not in SET_HERE}
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, env={**inherited, **environment}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait(30)


def server_process(url: str) -> int:
    """The process id of the engine's server that was started for ``url``."""
    port = url.rpartition(":")[2].encode()
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            if b"--port\0" + port + b"\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    raise AssertionError(f"no server was started for {url}")


def descendant(pid: int, name: str) -> int:
    """The process id of a child, or a child's child, whose command line holds ``name``."""
    waiting = [pid]
    while waiting:
        pid = waiting.pop()
        if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
        waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    raise AssertionError(f"there is no process {name}")


def wait_until(url: str, child: subprocess.Popen[bytes], log: Path, seconds: float = 240.0) -> None:
    """Return when ``url`` answers 200."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if child.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2.0).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"{url} is not ready (exit status {child.poll()}): {log.read_text()[-3000:]}")


def engine_command(model: Path, bundle: Path, key_file: Path, name: str, port: int, *flags: str) -> list[str]:
    """The command line of a guarded vLLM server."""
    return [
        *(sys.executable, "-m", "guard.engine", "--model", str(model), "--bundle", str(bundle)),
        *("--key-file", str(key_file), "--served-model-name", name, "--host", "127.0.0.1"),
        *("--port", str(port), *ENGINE_FLAGS, *flags),
    ]


@contextlib.contextmanager
def engine(
    model: Path,
    bundle: Path,
    key_file: Path,
    name: str,
    log: Path,
    *flags: str,
    environment: dict[str, str] | None = None,
) -> Iterator[str]:
    """A guarded vLLM server; yields its URL when the self-test has passed."""
    port = free_port()
    command = engine_command(model, bundle, key_file, name, port, *flags)
    with process(command, {**ENVIRONMENT, **FORKED, **(environment or {})}, log) as child:
        wait_until(f"http://127.0.0.1:{port}/guard/status", child, log)
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def gateway(
    engine_url: str, key_file: Path, folder: Path, served: dict[str, Any] | None = None
) -> Iterator[str]:
    """A gateway with one API key for each policy; yields its URL when it is ready."""
    port, policies, log = free_port(), folder / "policies.yaml", folder / "gateway.log"
    policies.write_text(yaml.safe_dump(served or POLICIES))
    environment = {
        "NEURONGUARD_ENGINE_URL": engine_url,
        "NEURONGUARD_KEY_FILE": str(key_file),
        "NEURONGUARD_POLICY_FILE": str(policies),
        "NEURONGUARD_PORT": str(port),
    }
    with process([sys.executable, "-m", "service"], environment, log) as child:
        wait_until(f"http://127.0.0.1:{port}/readyz", child, log)
        yield f"http://127.0.0.1:{port}"
