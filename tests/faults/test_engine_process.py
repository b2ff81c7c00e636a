"""An engine's server that is stopped or killed as a process, with requests on their way."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx

from guard.sealed import Keyring
from loadtests.gateway.mock import MODEL
from tests.e2e.servers import free_port, process, wait_until
from tests.service.answers import CHATS
from tests.service.processes import GatewayProcess, gateway_process

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
SLOWLY = CHAT | {"stream": True, "max_tokens": 200, "seed": 100}


@contextmanager
def engine(folder: Path, port: int) -> Iterator[Popen[bytes]]:
    log = folder / "engine.log"
    command = [sys.executable, "-m", "loadtests.gateway.mock", str(port), str(folder / "keys")]
    with process(command, {}, log) as child:
        wait_until(f"http://127.0.0.1:{port}/guard/status", child, log, 30.0)
        yield child


def ask(gate: GatewayProcess, **more: Any) -> httpx.Response:
    return httpx.post(gate.url + CHATS, json=CHAT | more, timeout=20)


def until(gate: GatewayProcess, status: int) -> None:
    """Wait for what ``/readyz`` says."""
    deadline = time.monotonic() + 20
    while httpx.get(gate.url + "/readyz", timeout=10).status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def error(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_an_engine_that_hangs_or_dies_is_an_error_and_one_that_is_back_answers(tmp_path: Path) -> None:
    Keyring.generate().save(tmp_path / "keys")
    port = free_port()
    times = {
        "verdict_timeout": "1.0",
        "answer_timeout": "4.0",
        "idle_timeout": "1.0",
        "status_timeout": "0.3",
    }
    with engine(tmp_path, port) as child:
        gateway = gateway_process(tmp_path, f"http://127.0.0.1:{port}", tmp_path / "keys", **times)
        with gateway as gate:
            assert ask(gate).status_code == 200

            # It hangs, with a stream on its way and before a request.
            with httpx.stream("POST", gate.url + CHATS, json=SLOWLY, timeout=20) as stream:
                parts = stream.iter_text()
                assert "data: " in next(parts)
                child.send_signal(signal.SIGSTOP)
                rest = "".join(parts)
            assert "upstream_interrupted" in rest
            assert "[DONE]" not in rest
            # Its server was ready a moment ago; soon it is known not to be, and nobody waits any more.
            assert error(ask(gate, stream=True)) in ((504, "engine_timeout"), (503, "engine_not_ready"))
            until(gate, 503)
            assert error(ask(gate)) == (503, "engine_not_ready")
            assert gate.metric("guard_upstream_up") == 0
            child.send_signal(signal.SIGCONT)
            until(gate, 200)
            assert ask(gate).status_code == 200

            # It is killed, with a stream on its way.
            threading.Timer(0.3, child.kill).start()
            cut = httpx.post(gate.url + CHATS, json=SLOWLY, timeout=20).text
            assert "upstream_interrupted" in cut
            assert "[DONE]" not in cut
            assert error(ask(gate)) in ((503, "engine_unreachable"), (503, "engine_not_ready"))
            until(gate, 503)

            with engine(tmp_path, port):
                until(gate, 200)
                assert ask(gate, stream=True, max_tokens=2).text.endswith("data: [DONE]\n\n")

            ends = gate.ends()
            assert len(gate.answers()) == len(ends) == 8
            outcomes = [line["outcome"] for line in ends.values()]
            assert (outcomes.count("interrupted"), outcomes.count("complete")) == (2, 6)
            assert gate.metric("guard_errors_total", stage="stream", outcome="closed") == 2
            assert gate.metric("guard_errors_total", stage="backend", outcome="closed") == 3
            assert gate.metric("guard_bypass_total") == 0
