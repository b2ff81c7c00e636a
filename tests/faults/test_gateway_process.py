"""A gateway that is killed, told to stop, or cannot write its audit log."""

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.answers import CHATS
from tests.service.fake_engine import BAD_CHAT, CHAT, SECRET, FakeEngine, chunk
from tests.service.processes import GatewayProcess, gateway_process
from tests.service.world import serving, settings_for

STREAM = CHAT | {"stream": True}
NOBODY = resource.RLIM_INFINITY


@contextmanager
def running(folder: Path, **settings: str) -> Iterator[tuple[GatewayProcess, FakeEngine]]:
    engine = FakeEngine()
    key_file = settings_for(engine, folder).key_file
    with serving(engine) as url, gateway_process(folder, url, key_file, **settings) as process:
        yield process, engine


class Reader:
    """Reads a stream in a thread, for as long as there is one."""

    def __init__(self, url: str, name: str) -> None:
        self.text = ""
        self.broke = False
        self.begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(url, name))
        self._thread.start()

    def _read(self, url: str, name: str) -> None:
        try:
            with httpx.stream(
                "POST", url + CHATS, json=STREAM, headers={"x-request-id": name}, timeout=30
            ) as answer:
                for part in answer.iter_text():
                    self.text += part
                    self.begun.set()
        except httpx.TransportError:
            self.broke = True

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


def begin(process: GatewayProcess, *names: str) -> list[Reader]:
    readers = [Reader(process.url, name) for name in names]
    assert all(reader.begun.wait(10) for reader in readers)
    return readers


def test_what_a_killed_gateway_had_begun_to_answer_is_in_its_audit_log(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").write_text('{"event":"answer","requ')  # of one that was killed before it
    with running(tmp_path) as (process, engine):
        whole = httpx.post(process.url + CHATS, json=CHAT, headers={"x-request-id": "whole"}, timeout=10)
        assert whole.status_code == 200
        engine.stream = [chunk("first"), 30.0]
        readers = begin(process, "a", "b")
        process.child.kill()
        assert process.child.wait(10) == -9
        for reader in readers:
            reader.join()
            assert reader.broke
            assert "first" in reader.text
            assert "[DONE]" not in reader.text
        assert set(process.answers()) == {"whole", "a", "b"}
        assert engine.aborted.wait(5)  # the engine does not go on for nobody
        with pytest.raises(httpx.ConnectError):
            httpx.get(process.url + "/healthz")


def test_a_stream_that_outlasts_the_time_to_stop_is_cut_off_and_says_so(tmp_path: Path) -> None:
    with running(tmp_path, shutdown_timeout="1") as (process, engine):
        engine.stream = [chunk("first"), 30.0]
        (reader,) = begin(process, "long")
        started = time.monotonic()
        process.child.terminate()
        assert process.child.wait(15) in (0, -15)
        assert 0.9 < time.monotonic() - started < 10
        reader.join()
        assert "[DONE]" not in reader.text
        (line,) = process.ends().values()
        assert (line["status"], line["outcome"]) == (200, "interrupted")
        assert engine.aborted.wait(5)


def allow(process: GatewayProcess, more: int | None) -> None:
    """Let the process's files grow by so many bytes; None: without end."""
    size = (process.folder / "audit.jsonl").stat().st_size
    limit = NOBODY if more is None else size + more
    resource.prlimit(process.child.pid, resource.RLIMIT_FSIZE, (limit, NOBODY))


def test_a_full_disk_closes_the_gateway_and_room_opens_it_again(tmp_path: Path) -> None:
    def ask(name: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(process.url + CHATS, json=body, headers={"x-request-id": name}, timeout=10)

    with running(tmp_path) as (process, engine):
        assert ask("before", CHAT).status_code == 200
        # The last line of an answer goes out behind it, so that only its loss can be counted.
        full = threading.Event()
        engine.stream = [chunk("first"), full, chunk("second"), b"data: [DONE]\n\n"]
        (reader,) = begin(process, "during")
        allow(process, 0)
        full.set()
        reader.join()
        assert "[DONE]" in reader.text
        engine.stream = None
        deadline = time.monotonic() + 5
        while process.metric("guard_errors_total", stage="audit", outcome="open") != 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)

        refused = 0
        for room in (0, 40, 200):  # no room at all, and for the beginning of a line
            allow(process, room)
            for index, body in enumerate((CHAT, STREAM, BAD_CHAT)):
                answer = ask(f"full-{room}-{index}", body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "audit_failed")
                assert SECRET not in answer.text
                assert "x-guard-action" not in answer.headers
                refused += 1
        assert process.metric("guard_errors_total", stage="audit", outcome="closed") == refused
        assert process.metric("guard_errors_total", stage="audit", outcome="open") == 1
        assert "the audit log cannot be written" in process.log

        allow(process, None)
        assert ask("after", CHAT).status_code == 200
        assert httpx.get(process.url + "/readyz").status_code == 200
        deadline = time.monotonic() + 5
        while "after" not in process.ends():  # which parses every line of the file
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert set(process.answers()) == {"before", "during", "after"}
        assert set(process.ends()) == {"before", "after"}
