"""Who is told of answers that were stopped: the audit log and the counters."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from service.audit import logger as audit_logger
from tests.service.answers import CHATS
from tests.service.fake_answers import TOKENS
from tests.service.fake_engine import CHAT, MODEL
from tests.service.test_stopped_answers import watched
from tests.service.world import World, world

STOPS = ("stopped", "stopped_after", "stopped_logit")
COUNTER, TOKENS_TO_STOP = "guard_answers_stopped_total", "guard_answer_stopped_after_tokens"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, audit_logger.name)
    return lambda: [json.loads(r.message) for r in caplog.records if r.name == audit_logger.name]


def told(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in STOPS)


def counted(w: World, style: str, text: str) -> float:
    return w.metric(COUNTER, policy="default", model=MODEL, style=style, text=text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["keep", "withdraw"])
async def test_the_last_line_says_how_many_and_after_how_many_tokens(
    text: str, stream: bool, tmp_path: Path, lines: Any
) -> None:
    async with watched(tmp_path, "message", text) as w:
        w.engine.stops_after = {0: 2, 2: 1}
        await w.client.post(CHATS, json=CHAT | {"n": 3, "stream": stream})
    first, last = lines()
    assert (first["action"], first["verdict"], last["event"]) == ("pass", "pass", "end")
    assert told(last) == (2, 1, None)
    assert not any(token in json.dumps(line) for line in (first, last) for token in TOKENS)


async def test_the_logit_is_written_only_if_allowed(tmp_path: Path, lines: Any) -> None:
    async with watched(tmp_path, audit_scores=True) as w:
        w.engine.stops_after = {0: 2, 1: 1}
        await w.client.post(CHATS, json=CHAT | {"n": 2})
    assert told(lines()[1]) == (2, 1, 4.5)


@pytest.mark.parametrize(("more", "stopped"), [("", 0), ("mode: observe, ", None)])
async def test_watched_and_not_stopped_differs_from_not_watched(
    more: str, stopped: int | None, tmp_path: Path, lines: Any
) -> None:
    async with watched(tmp_path, more=more) as w:
        w.engine.stops_after = {}
        await w.client.post(CHATS, json=CHAT)
    assert told(lines()[1]) == (stopped, None, None)


async def test_without_a_monitor_there_is_nothing_to_tell(tmp_path: Path, lines: Any) -> None:
    async with world(tmp_path) as w:
        await w.client.post(CHATS, json=CHAT)
        assert w.total(COUNTER) == 0
        assert "_bucket" not in str(
            [s for m in w.registry.collect() if m.name == TOKENS_TO_STOP for s in m.samples]
        )
    assert told(lines()[1]) == (None, None, None)


async def test_an_answer_that_is_an_error_in_the_end_says_so(tmp_path: Path, lines: Any) -> None:
    async with watched(tmp_path, "error", "withdraw") as w:
        await w.client.post(CHATS, json=CHAT | {"stream": True})
    first, last = lines()
    assert (first["status"], last["status"], last["code"]) == (403, 403, "content_policy_violation")
    assert told(last) == (1, 1, None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["keep", "withdraw"])
async def test_every_stopped_choice_counts_once(text: str, stream: bool, tmp_path: Path) -> None:
    async with watched(tmp_path, "azure", text) as w:
        assert (counted(w, "azure", text), w.metric(f"{TOKENS_TO_STOP}_count", model=MODEL)) == (0, 0)
        samples = [s for m in w.registry.collect() for s in m.samples if s.name == COUNTER]
        assert len(samples) == 1  # it was there, so that the first stop is an increase
        w.engine.stops_after = {0: 2, 2: 1}
        await w.client.post(CHATS, json=CHAT | {"n": 3, "stream": stream})
        assert counted(w, "azure", text) == 2
        assert w.metric(f"{TOKENS_TO_STOP}_sum", model=MODEL) == 3
        assert w.metric(f"{TOKENS_TO_STOP}_bucket", model=MODEL, le="1.0") == 1
        common = {"policy": "default", "model": MODEL, "verdict": "pass", "action": "pass"}
        assert w.metric("guard_requests_total", mode="enforce", stream=str(stream).lower(), **common) == 1
