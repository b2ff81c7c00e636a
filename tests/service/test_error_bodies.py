"""What a client is told when something is wrong: never a prompt, an answer or a key."""

from pathlib import Path
from typing import Any

import pytest

from tests.service.answers import CHATS, TEXTS
from tests.service.fake_engine import CHAT, MODEL, SECRET
from tests.service.test_audit import CANARY, KEY
from tests.service.world import world

SAID = {"role": "user", "content": CANARY}
ASKED = CHAT | {"messages": [SAID]}
WRONG: dict[str, tuple[str, Any]] = {
    "no number": (CHATS, ASKED | {"temperature": CANARY}),
    "a number out of range": (CHATS, ASKED | {"max_tokens": -1}),
    "no list": (CHATS, CHAT | {"messages": CANARY}),
    "no text": (CHATS, CHAT | {"messages": [SAID | {"content": {"text": CANARY}}]}),
    "another role": (CHATS, CHAT | {"messages": [SAID, SAID | {"role": CANARY}]}),
    "an image": (
        CHATS,
        CHAT | {"messages": [SAID | {"content": [{"type": "image_url", "image_url": CANARY}]}]},
    ),
    "an unknown field": (CHATS, ASKED | {"vllm_xargs": {"a": CANARY}}),
    "an unknown field of a message": (CHATS, CHAT | {"messages": [SAID | {"prefix": CANARY}]}),
    "a prefilled answer": (CHATS, CHAT | {"messages": [SAID, SAID | {"role": "assistant"}]}),
    "another model": (CHATS, ASKED | {"model": "nobody"}),
    "not of the shape": (TEXTS, {"model": MODEL, "prompt": [CANARY, 5]}),
    "a suffix": (TEXTS, {"model": MODEL, "prompt": "a", "suffix": CANARY}),
}


@pytest.mark.parametrize("name", WRONG)
async def test_an_error_about_a_request_repeats_nothing_of_it(name: str, tmp_path: Path) -> None:
    path, body = WRONG[name]
    async with world(tmp_path) as w:
        answer = await w.client.post(path, json=body, headers={"authorization": f"Bearer {KEY}"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]
    for text in (CANARY, KEY, SECRET):
        assert text not in answer.text
        assert text not in str(answer.headers)
