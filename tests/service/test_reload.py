"""New policies take the place of old ones without a request noticing; wrong ones do not."""

import asyncio
import hashlib
import os
import signal
from pathlib import Path

import httpx
import pytest

from tests.service.answers import CHATS
from tests.service.fake_engine import BAD_CHAT, CHAT, a_status
from tests.service.world import World, eventually, live, world

RELOAD = "/admin/policies/reload"
ENFORCE = "policies: {default: {}}"
OBSERVE = "policies: {default: {mode: observe}}"


def rewrite(folder: Path, text: str) -> None:
    """Replace the file as editors and configuration tools do."""
    new = folder / "new.yaml"
    new.write_text(text)
    os.replace(new, folder / "policy.yaml")


async def action(w: World) -> str:
    return (await w.client.post(CHATS, json=BAD_CHAT)).headers["x-guard-action"]


async def test_the_admin_route_puts_a_new_file_in_force(tmp_path: Path) -> None:
    async with world(tmp_path, ENFORCE, policy_interval=0) as w:
        assert await action(w) == "refuse"
        rewrite(tmp_path, OBSERVE)
        assert await action(w) == "refuse"
        answer = await w.client.post(RELOAD)
        assert (answer.status_code, answer.json()) == (200, {"policies": ["default"]})
        assert await action(w) == "pass"
        assert w.metric("guard_policy_reloads_total", result="done") == 1
        assert (
            w.metric("guard_policy_info", policy="default", mode="observe", on_missing_verdict="closed") == 1
        )
        assert w.total("guard_policy_info") == 1


async def test_sighup_puts_a_new_file_in_force(tmp_path: Path) -> None:
    async with world(tmp_path, ENFORCE, policy_interval=0) as w:
        rewrite(tmp_path, OBSERVE)
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: w.metric("guard_policy_reloads_total", result="done") == 1)
        assert await action(w) == "pass"


async def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    async with world(tmp_path, ENFORCE, policy_interval=0.02) as w:
        rewrite(tmp_path, OBSERVE)
        await eventually(lambda: w.metric("guard_policy_reloads_total", result="done") == 1)
        assert await action(w) == "pass"


WRONG = {
    "not valid": "policies: {default: {mood: good}}",
    "not for this bundle": "policies: {default: {rules: [{above: {fpr: 0.5}, action: refuse}]}}",
    "a judge's key is not there": (
        "policies: {default: {}}\n"
        "judges: {a: {base_url: 'http://judge/v1', model: m, api_key_file: /nowhere/key}}"
    ),
}


@pytest.mark.parametrize("why", WRONG)
async def test_a_bad_file_leaves_the_old_one_in_force(
    why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, ENFORCE, policy_interval=0.02) as w:
        rewrite(tmp_path, WRONG[why])
        await eventually(lambda: w.metric("guard_policy_reloads_total", result="failed") == 1)
        assert "the policies in force stay as they are" in caplog.text
        assert await action(w) == "refuse"
        answer = await w.client.post(RELOAD)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "policy_file_wrong")
        assert w.watch.ready is not None
        await asyncio.sleep(0.1)  # a file that is wrong is read once, not at every look
        assert w.metric("guard_policy_reloads_total", result="failed") == 2
        rewrite(tmp_path, OBSERVE)
        await eventually(lambda: w.metric("guard_policy_reloads_total", result="done") == 1)
        assert await action(w) == "pass"


async def test_a_file_without_keys_does_not_open_a_public_gateway(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"k").hexdigest()
    with_key = f"policies: {{default: {{}}}}\nkeys: [{{sha256: {digest}, tenant: t, rights: [admin, chat]}}]"
    async with world(tmp_path, with_key, host="0.0.0.0", policy_interval=0) as w:
        rewrite(tmp_path, ENFORCE)
        answer = await w.client.post(RELOAD, headers={"authorization": "Bearer k"})
        assert answer.status_code == 409
        assert "loopback" in answer.json()["error"]["message"]
        assert (await w.client.post(CHATS, json=CHAT)).status_code == 401


async def test_reloading_needs_the_right_admin(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"k").hexdigest()
    text = f"policies: {{default: {{}}}}\nkeys: [{{sha256: {digest}, tenant: t}}]"
    async with world(tmp_path, text) as w:
        answer = await w.client.post(RELOAD, headers={"authorization": "Bearer k"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_rights")
        assert (await w.client.post(RELOAD)).status_code == 401
        assert w.total("guard_policy_reloads_total") == 0


async def test_a_request_keeps_the_policy_that_it_came_under(tmp_path: Path) -> None:
    """Also when that policy is gone from the file before the engine has answered."""
    text = f"policies: {{default: {{}}, old: {{}}}}\nkeys: [{{sha256: {'a' * 64}, tenant: t, policy: old}}]"
    text = text.replace("a" * 64, hashlib.sha256(b"k").hexdigest())
    async with world(tmp_path, text, policy_interval=0) as w:
        w.engine.before_headers = 0.2
        asked = asyncio.create_task(
            w.client.post(CHATS, json=BAD_CHAT, headers={"authorization": "Bearer k"})
        )
        await eventually(lambda: len(w.engine.seen) == 1)
        rewrite(tmp_path, OBSERVE)
        assert w.app.state.gateway.store.reload()
        answer = await asked
        assert (answer.headers["x-guard-action"], answer.headers["x-guard-policy"]) == ("refuse", "old")


async def test_a_body_that_arrives_after_the_reload_is_judged_as_admitted(tmp_path: Path) -> None:
    async with world(tmp_path, ENFORCE, policy_interval=0) as w:
        admitted = asyncio.Event()

        async def slowly():
            yield b'{"model": "lab/tiny", '
            admitted.set()
            await asyncio.sleep(0.1)
            yield b'"messages": [{"role": "user", "content": "bomb"}]}'

        headers = {"content-type": "application/json"}
        asked = asyncio.create_task(w.client.post(CHATS, content=slowly(), headers=headers))
        await admitted.wait()
        rewrite(tmp_path, "policies: {default: {mode: observe}, other: {}}")
        w.app.state.gateway.store.reload()
        assert (await asked).headers["x-guard-action"] == "refuse"


def test_no_request_is_dropped_while_policies_change(tmp_path: Path) -> None:
    with live(tmp_path, ENFORCE, policy_interval=0) as gate, httpx.Client() as client:
        for index in range(40):
            rewrite(tmp_path, OBSERVE if index % 2 else ENFORCE)
            answers = [client.post(gate.url + CHATS, json=BAD_CHAT | {"stream": bool(index % 3)})]
            answers.append(client.post(gate.url + RELOAD))
            assert [answer.status_code for answer in answers] == [200, 200]


async def test_a_bundle_struck_off_the_list_closes_the_gateway_and_a_new_file_opens_it(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, ENFORCE, policy_interval=0) as w:
        gateway = w.app.state.gateway
        rewrite(tmp_path, ENFORCE + f"\nbundles: ['{'c' * 64}']")
        gateway.store.reload()
        await eventually(lambda: gateway.pool.watches[0].ready is None)
        w.engine.status = a_status(bundle="c" * 64)
        await eventually(lambda: gateway.pool.watches[0].ready is not None)
