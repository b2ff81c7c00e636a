"""A gateway that is told to stop: running answers finish, and load balancers are told first."""

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.service.answers import CHATS
from tests.service.fake_engine import CHAT, FakeEngine, chunk
from tests.service.processes import gateway_process
from tests.service.world import serving, settings_for


@contextmanager
def process(folder: Path, engine: FakeEngine, **more: str) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    key_file = settings_for(engine, folder).key_file
    with (
        serving(engine) as engine_url,
        gateway_process(folder, engine_url, key_file, **more) as gateway,
    ):
        yield gateway.url, gateway.child


@pytest.mark.parametrize("stream", [True, False])
def test_answers_that_are_on_their_way_finish(stream: bool, tmp_path: Path) -> None:
    engine = FakeEngine()
    with process(tmp_path, engine) as (url, child):
        engine.stream = [chunk("one"), 1.0, chunk("two"), b"data: [DONE]\n\n"] if stream else None
        engine.before_headers = 0.0 if stream else 1.0
        got: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: got.append(httpx.post(url + CHATS, json=CHAT | {"stream": stream}, timeout=20))
        )
        asking.start()
        deadline = time.monotonic() + 10
        while not engine.seen and time.monotonic() < deadline:
            time.sleep(0.02)
        child.terminate()
        asking.join(20)
        assert child.wait(20) in (0, -signal.SIGTERM)
        assert got[0].status_code == 200
        assert ("[DONE]" if stream else "zxq-model-token") in got[0].text
        with pytest.raises(httpx.TransportError):
            httpx.get(url + "/healthz")


def test_it_says_that_it_will_stop_before_it_does(tmp_path: Path) -> None:
    with process(tmp_path, FakeEngine(), drain_delay="1.5") as (url, child):
        child.terminate()
        time.sleep(0.2)
        ready = httpx.get(url + "/readyz")
        assert (ready.status_code, ready.json()["detail"]) == (503, "the gateway is stopping")
        assert httpx.post(url + CHATS, json=CHAT).status_code == 200
        assert child.wait(20) in (0, -signal.SIGTERM)
