"""The servers of one layout: plain vLLM, and guarded vLLM behind a gateway."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from guard.engine.forking import BIND_ENV, METHOD_ENV
from guard.serve.plan import free_port

FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "32"),
    *("--max-num-seqs", "16", "--max-num-batched-tokens", "1024", "--num-gpu-blocks-override", "256"),
    *("--uvicorn-log-level", "warning", "--host", "127.0.0.1", "--served-model-name", "model"),
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    BIND_ENV: "nobind",
    METHOD_ENV: "fork",
}
PLAIN = (
    "from guard.engine.forking import keep_fork; keep_fork(); "
    "from vllm.entrypoints.launchers.api_server.entry import main; main()"
)
SECONDS = 240.0


@dataclass(frozen=True)
class Layout:
    """How many engines there are, and how each is split."""

    title: str
    engines: int = 1
    flags: tuple[str, ...] = ()


LAYOUTS = {
    "one": Layout("one engine"),
    "replicas": Layout("two replicas", engines=2),
    "dp": Layout("two data-parallel ranks", flags=("--data-parallel-size", "2")),
    "tp": Layout("two tensor-parallel ranks", flags=("--tensor-parallel-size", "2")),
}


class Servers:
    """Processes that are measured together."""

    def __init__(self, urls: Sequence[str], processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.urls = list(urls)
        """Where requests go, in turn."""
        self._roots = [psutil.Process(process.pid) for process in processes]

    def cpu(self) -> float:
        """CPU seconds of all of them and of what they started."""
        total = 0.0
        for root in self._roots:
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total


@contextlib.contextmanager
def process(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A child with its output in ``log``, stopped afterwards."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT, **environment}, stdout=output, stderr=output
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(60)


def wait_ready(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    """Return when ``url`` answers 200; SystemExit when it never will."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and child.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2.0).status_code == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"{url} did not become ready; see {log}")


@contextlib.contextmanager
def running(
    layout: Layout, model: Path, bundle: Path, keys: Path, logs: Path
) -> Iterator[dict[str, Servers]]:
    """``{"off": plain vLLM, "on": guarded vLLM behind a gateway}``, started side by side."""
    python, found = sys.executable, {}
    guarded = ["-m", "guard.engine", "--bundle", str(bundle), "--key-file", str(keys)]
    with contextlib.ExitStack() as stack:

        def start(name: str, command: Sequence[str], ready: str, **environment: str) -> _Started:
            log = logs / f"{name}.log"
            port = free_port()
            command = [*command, *(() if environment else ("--port", str(port)))]
            child = stack.enter_context(process(command, log, {**environment, "NEURONGUARD_PORT": str(port)}))
            return _Started(f"http://127.0.0.1:{port}", ready, child, log)

        common = ("--model", str(model), *FLAGS, *layout.flags)
        off = [start(f"plain-{n}", [python, "-c", PLAIN, *common], "/health") for n in range(layout.engines)]
        on = [
            start(f"guarded-{n}", [python, *guarded, *common], "/guard/status") for n in range(layout.engines)
        ]
        for started in [*off, *on]:
            started.wait()
        urls = ",".join(started.url for started in on)
        gateway = start(
            "gateway",
            [python, "-m", "service"],
            "/readyz",
            NEURONGUARD_ENGINE_URL=urls,
            NEURONGUARD_KEY_FILE=str(keys),
        )
        gateway.wait()
        found["off"] = Servers([started.url for started in off], [started.child for started in off])
        found["on"] = Servers([gateway.url], [started.child for started in [*on, gateway]])
        yield found


@dataclass(frozen=True)
class _Started:
    url: str
    ready: str
    child: subprocess.Popen[bytes]
    log: Path

    def wait(self) -> None:
        wait_ready(self.url + self.ready, self.child, self.log)
