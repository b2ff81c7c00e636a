"""What to start: the command lines and environments of engine and gateway."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from guard.serve.children import Service

# Lab models are small and were trained on short texts; a model of one's own keeps its own length and cache.
_LAB_FLAGS = (
    *("--max-model-len", "512", "--num-gpu-blocks-override", "512"),
    # Unless a client says otherwise: sampled at temperature 1 they lose the thread at once.
    *("--override-generation-config", '{"temperature": 0.0}'),
)
_FLAGS = (
    *("--dtype", "float32"),
    "--enforce-eager",
    *("--block-size", "32"),
    *("--max-num-seqs", "64"),
    *("--max-num-batched-tokens", "2048"),
)
_QUIET_FLAGS = ("--uvicorn-log-level", "warning")


@dataclass(frozen=True)
class Served:
    """The model behind the endpoint and the bundle that guards it."""

    name: str
    model: Path
    bundle: Path
    lab: bool
    """Whether it is one of the lab models."""


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def engine(
    served: Served, port: int, key_file: Path, *, extra: Sequence[str] = (), verbose: bool = False
) -> Service:
    """The guarded vLLM server. ``extra`` flags come last and so win over ours."""
    command = [
        *(sys.executable, "-m", "guard.engine"),
        *("--model", str(served.model), "--bundle", str(served.bundle), "--key-file", str(key_file)),
        *("--served-model-name", served.name, "--host", "127.0.0.1", "--port", str(port)),
        *_FLAGS,
        *(_LAB_FLAGS if served.lab else ()),
        *(() if verbose else _QUIET_FLAGS),
        *extra,
    ]
    return Service("engine", command, engine_environment(os.environ, verbose), port, "/guard/status")


def engine_environment(ours: Mapping[str, str], verbose: bool = False) -> dict[str, str]:
    """The engine's environment: what the user set, over our defaults, over vLLM's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        # Left to itself vLLM ties its threads to chosen cores, which starves on a machine that does other
        # work too, and fails where a container shows a single core.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # All processes as copies of the first: libraries are imported once and not three times.
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
        # One core stays for the server and engine loops, which are busy whenever the model is.
        "OMP_NUM_THREADS": str(max(1, cores - 1)),
        # GiB; naming a size also skips a warm-up of the compiler.
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "INFO" if verbose else "WARNING",
    }
    forced = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    return {**defaults, **ours, **forced}


def gateway(host: str, port: int, engine_port: int, key_file: Path, policy_file: Path | None) -> Service:
    """The gateway in front of the engine."""
    settings = {
        "NEURONGUARD_ENGINE_URL": f"http://127.0.0.1:{engine_port}",
        "NEURONGUARD_KEY_FILE": str(key_file),
        "NEURONGUARD_HOST": host,
        "NEURONGUARD_PORT": str(port),
        # Below the supervisor's own patience: the gateway ends a long answer, not a SIGKILL.
        "NEURONGUARD_SHUTDOWN_TIMEOUT": "5",
        # A configured proxy must not get the requests to the engine.
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"])),
    }
    if policy_file:
        settings["NEURONGUARD_POLICY_FILE"] = str(policy_file)
    command = [sys.executable, "-m", "service"]
    return Service("gateway", command, {**os.environ, **settings}, port, "/readyz", reachable_address(host))


def reachable_address(host: str) -> str:
    """Where this machine reaches a server that listens on ``host``, which may stand for all addresses."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # compared, not bound
