"""What must hold for any bytes that clients, engines or operators hand to the gateway's decoders.

A target takes bytes and raises only when one of its promises is broken.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from guard.monitor import STOPPED, MonitorThreshold, Stop
from guard.sealed import Keyring, SealError
from guard.verdict import (
    Decision,
    Directive,
    DirectiveError,
    EngineStatus,
    Rule,
    Threshold,
    Verdict,
    VerdictError,
)
from service.chat_body import ChatBody
from service.completion_body import CompletionBody
from service.directives import Order
from service.errors import ApiError, ConfigError
from service.fields import ADVICE, Generation, validate
from service.key_index import KeyIndex
from service.policy import PolicyError
from service.policy_file import bind, load_policies
from service.settings import load_settings
from service.stream import AnswerWatch, SseDecoder, StreamError
from service.strict_json import parse_object

KEYS = Keyring((("fuzz", bytes(range(32))),))
DECISION = Decision(policy="default", rules=(Rule(above=0.5, action="refuse"), Rule(above=0.2, action="tag")))
DIRECTIVE = Directive(
    audience="engine",
    expires=2e9,
    nonce="n" * 24,
    body_sha256="0" * 64,
    siblings=1,
    decision=DECISION,
)
VERDICT = Verdict(
    action="pass",
    decision="pass",
    probability=0.01,
    logit=-4.6,
    threshold=0.5,
    unsafe=False,
    mode="enforce",
    policy="default",
    bundle="b" * 64,
    read="prompt_last",
    prompt_tokens=7,
    nonce="n" * 24,
)
STATUS = EngineStatus(
    state="ready",
    detail="",
    audience="engine",
    model="model",
    max_model_len=512,
    bundle="b" * 64,
    label="unsafe_output",
    thresholds=(Threshold(false_positive_rate=0.01, probability=0.5, logit=0.0, benign=9, upper95=0.3),),
    monitor=(MonitorThreshold(false_positive_rate=0.01, debounce=4, logit=2.5, answers=9, upper95=0.3),),
    default=DECISION,
    guard_version="0",
    vllm_version="0",
)
STOP = Stop(nonce="n" * 24, tokens=3, logit=2.5)
SEALED_STATUS = STATUS.seal(STATUS.model_dump_json().encode(), KEYS)
_FOLDER = Path(tempfile.mkdtemp(prefix="neuronguard-fuzz-"))


def events(data: bytes) -> None:
    """Frames do not depend on how the bytes arrive, and lose none; the watch accepts JSON objects alone."""
    step, data = (data[0] % 7 + 1 if data else 1), data[1:]
    at_once, in_pieces = SseDecoder(4096), SseDecoder(4096)
    try:
        frames = at_once.decode(data)
        rest = at_once._buffer
        last = at_once.flush()
    except StreamError:
        return
    pieces = [frame for i in range(0, len(data), step) for frame in in_pieces.decode(data[i : i + step])]
    assert pieces + in_pieces.flush() == frames + last
    assert b"".join(frames) + rest == data
    watch = AnswerWatch()
    for frame in frames + last:
        try:
            watch.look(frame)
        except StreamError:
            return
        if watch.finished:
            json.loads(watch.chunk({}).removeprefix(b"data: "))


def chat(data: bytes) -> None:
    """A body is refused as a 400, or forwarded with declared fields only, as the client sent them."""
    _body(ChatBody, data)


def completion(data: bytes) -> None:
    """The same for text completions."""
    _body(CompletionBody, data)


def _body(model: type[Generation], data: bytes) -> None:
    try:
        value = parse_object(data, max_depth=64)
        body = validate(model, value)
        sent = body.forwarded()
    except ApiError as refused:
        error = refused
    else:
        json.loads(data, object_pairs_hook=_each_once)
        _forwarded(body, sent, value)
        return
    assert error.status == 400
    json.dumps(error.body()).encode()


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Parsers differ in which of two values they keep."""
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def _forwarded(body: Generation, sent: bytes, value: dict[str, Any]) -> None:
    again = json.loads(sent)
    assert parse_object(sent, max_depth=64) == again
    assert set(again) <= set(value)
    assert not set(again) & set(ADVICE)
    assert all(again[name] == value[name] for name in ("model", "prompt", "stream", "n") if name in again)
    if isinstance(body, ChatBody):
        said = [message.get("content") for message in value["messages"]]
        assert [message.get("content") for message in again["messages"]] == said
        assert value["messages"][-1]["role"] != "assistant"


def directive(data: bytes) -> None:
    """No string but the one that was sealed is a directive, whatever it looks like."""
    text = data.decode("latin-1")
    with suppress(DirectiveError):
        assert Directive.open(text, KEYS, audience="engine") == DIRECTIVE
        assert text == DIRECTIVE.seal(KEYS)


def sealed_directive(data: bytes) -> None:
    """Whatever a holder of the key has sealed is a directive or refused as one."""
    with suppress(DirectiveError):
        opened = Directive.open(KEYS.seal("directive", data), KEYS, audience="engine")
        assert Directive.open(opened.seal(KEYS), KEYS, audience="engine") == opened
        assert 1 <= opened.siblings <= 1024
        opened.decision.decide(0.5)


def verdict(data: bytes) -> None:
    """No string but the one that was sealed is the verdict."""
    text = data.decode("latin-1")
    with suppress(VerdictError):
        assert Verdict.open(text, KEYS, nonce="n" * 24) == VERDICT
        assert text == VERDICT.seal(KEYS)


def sealed_verdict(data: bytes) -> None:
    """Even of a key's holder only a verdict that fits the order lets an answer out."""
    order = Order("sealed", "n" * 24, DECISION)
    try:
        found = order.verify(KEYS.seal("verdict", data), KEYS)
    except VerdictError:
        return
    assert found.nonce == order.nonce
    assert (found.policy, found.mode) == ("default", "enforce")
    if found.action in ("pass", "tag", "patch"):
        assert found.probability is not None
        assert found.probability < 0.5
        assert found.action == DECISION.decide(found.probability)


def stop_reason(data: bytes) -> None:
    """No text but the one that the engine has sealed for this request says that an answer was stopped."""
    text = data.decode("latin-1")
    found = Stop.of_reason(text, KEYS, nonce="n" * 24)
    assert (found == STOP) == (text == STOP.reason(KEYS))
    assert found in (None, STOP)


def sealed_stop(data: bytes) -> None:
    """Whatever a holder of the key has sealed is a stop of this request, or none."""
    found = Stop.of_reason(f"{STOPPED}:{KEYS.seal('stop', data)}", KEYS, nonce="n" * 24)
    if found is not None:
        assert found.nonce == "n" * 24
        assert found.tokens >= 1
        assert math.isfinite(found.logit)


def status(data: bytes) -> None:
    """A status is believed if it is the one that was sealed."""
    with suppress(SealError, ValidationError):
        assert EngineStatus.open(data, SEALED_STATUS, KEYS) == STATUS


def policies(data: bytes) -> None:
    """A policy file is in force as it stands, or wrong in one sentence that names it."""
    path = _FOLDER / "policies.yaml"
    path.write_bytes(data)
    try:
        found = load_policies(path)
    except PolicyError as wrong:
        error: PolicyError | None = wrong
    else:
        error = None
    if error is not None:
        assert str(path) in str(error)
        assert len(str(error).splitlines()) == 1
        return
    assert isinstance(found.key_index, KeyIndex)
    with suppress(PolicyError):
        for name, bound in bind(found, STATUS).items():
            assert bound.decision.mode == found.policies[name].mode
            assert (bound.decision.monitor is None) == (found.policies[name].monitor is None)
            above = [rule.above for rule in bound.decision.rules]
            assert above == sorted(set(above), reverse=True) or found.policies[name].rules is None


def settings(data: bytes) -> None:
    """A settings file is taken as it stands, or wrong in one sentence."""
    path = _FOLDER / "settings.yaml"
    path.write_bytes(data)
    with suppress(ConfigError):
        load_settings(path)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        events,
        chat,
        completion,
        directive,
        sealed_directive,
        verdict,
        sealed_verdict,
        stop_reason,
        sealed_stop,
        status,
        policies,
        settings,
    )
}
