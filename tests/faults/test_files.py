"""Files that go away or change while a gateway runs, and clocks that do."""

import os
import time
from pathlib import Path

import httpx
import pytest

from guard.verdict import DIRECTIVE_HEADER
from tests.service.answers import CHATS, assert_unanswered
from tests.service.fake_engine import BAD_CHAT, CHAT
from tests.service.world import World, eventually, world

ENFORCE = "policies: {default: {}}\n"
OBSERVE = "policies: {default: {mode: observe}}\n"
RELOAD = "/admin/policies/reload"


def reloads(w: World, result: str) -> float:
    return w.metric("guard_policy_reloads_total", result=result)


async def action(w: World) -> str:
    return (await w.client.post(CHATS, json=BAD_CHAT)).headers["x-guard-action"]


async def test_a_policy_file_that_is_gone_leaves_its_policies_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, ENFORCE, policy_interval=0.02) as w:
        (tmp_path / "policy.yaml").unlink()
        await eventually(lambda: reloads(w, "failed") == 1)
        assert "Cannot read the policy file" in caplog.text
        assert await action(w) == "refuse"
        assert (await w.client.get("/readyz")).status_code == 200
        assert (await w.client.post(RELOAD)).status_code == 409
        (tmp_path / "policy.yaml").write_text(OBSERVE)
        await eventually(lambda: reloads(w, "done") == 1)
        assert await action(w) == "pass"


@pytest.mark.parametrize("size", [0, 9, 21, len(OBSERVE) - 4])
async def test_half_a_policy_file_changes_nothing(size: int, tmp_path: Path) -> None:
    async with world(tmp_path, ENFORCE, policy_interval=0.02) as w:
        (tmp_path / "policy.yaml").write_text(OBSERVE[:size])
        await eventually(lambda: reloads(w, "failed") >= 1)
        assert await action(w) == "refuse"
        assert reloads(w, "done") == 0


async def test_a_policy_file_that_is_a_folder_or_unreadable_changes_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, ENFORCE, policy_interval=0.02) as w:
        (tmp_path / "policy.yaml").unlink()
        (tmp_path / "policy.yaml").mkdir()
        await eventually(lambda: reloads(w, "failed") >= 1)
        (tmp_path / "policy.yaml").rmdir()
        os.mkfifo(tmp_path / "policy.yaml")  # nobody writes into it: reading it would never end
        answer = await w.client.post(RELOAD)
        assert answer.status_code == 409
        assert await action(w) == "refuse"


async def test_a_key_ring_that_is_gone_is_still_in_use(tmp_path: Path) -> None:
    async with world(tmp_path, ENFORCE) as w:
        (tmp_path / "keys").unlink()
        assert (await w.client.post(CHATS, json=CHAT)).status_code == 200


class Clock:
    """Stands in for the module ``time`` of the part that makes directives."""

    def __init__(self, ahead: float) -> None:
        self.ahead = ahead

    def time(self) -> float:
        return time.time() + self.ahead


async def test_a_clock_that_lags_makes_directives_that_have_expired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as w:
        assert (await w.client.post(CHATS, json=CHAT)).status_code == 200
        for stream in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr("guard.verdict.time", Clock(-3600.0))
                assert_unanswered(
                    await w.client.post(CHATS, json=CHAT | {"stream": stream}), "guard_directive_refused"
                )
        assert w.metric("guard_errors_total", stage="directive", outcome="closed") == 2
        assert len(w.engine.seen) == 1
        assert (await w.client.post(CHATS, json=CHAT)).status_code == 200


async def test_deadlines_and_limits_do_not_hang_on_the_clock_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A jump of an hour, there and back, while requests are on their way."""
    async with world(tmp_path, verdict_timeout=5.0, answer_timeout=5.0) as w:
        real = time.time
        for ahead in (3600.0, -3600.0, 0.0):
            monkeypatch.setattr(time, "time", lambda ahead=ahead: real() + ahead)
            answers = [await w.client.post(CHATS, json=CHAT | {"stream": each}) for each in (False, True)]
            assert [answer.status_code for answer in answers] == [200, 200]
        assert all(isinstance(answer, httpx.Response) for answer in answers)
        assert all(seen.headers[DIRECTIVE_HEADER] for seen in w.engine.seen)
        assert w.total("guard_errors_total") == 0
