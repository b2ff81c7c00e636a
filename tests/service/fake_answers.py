"""What the fake model says, in the shape of vLLM's answers and streams."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

MODEL = "lab/tiny"
TOKENS = ("zxq-", "model-token")
SECRET = "".join(TOKENS)  # stands in everything that the fake model says


class End(NamedTuple):
    """How a choice ends: after how many of its tokens, and why beside the usual."""

    tokens: int = len(TOKENS)
    stop_reason: str | None = None

    @property
    def said(self) -> str:
        return "".join(TOKENS[: self.tokens])


def frame(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(text: str | None, reason: str | None = None, index: int = 0, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    choice = {"index": index, "delta": delta, "finish_reason": reason} | more
    return _chunk("chat.completion.chunk", [choice])


def whole(body: dict[str, Any], ends: Sequence[End]) -> dict[str, Any]:
    if "messages" in body:
        return _answer("chat.completion", [_message(index, end) for index, end in enumerate(ends)], ends)
    choices = [_choice(index, end) | {"text": end.said} for index, end in enumerate(ends)]
    return _answer("text_completion", choices, ends)


def stream_of(body: dict[str, Any], ends: Sequence[End]) -> list[bytes]:
    """The frames of a stream; those of the choices take turns, as with vLLM."""
    usage = [_chunk(_kind(body), [], usage=_usage(ends))] if _wants_usage(body) else []
    choices = [list(_frames(body, index, end)) for index, end in enumerate(ends)]
    turns = [frames[i] for i in range(max(map(len, choices))) for frames in choices if i < len(frames)]
    return [*turns, *usage, b"data: [DONE]\n\n"]


def together(frames: list[bytes]) -> list[bytes]:
    """The same stream with two frames in one, which vLLM does not do and the API allows."""
    *parts, done = frames
    values = [json.loads(part.removeprefix(b"data: ")) for part in parts]
    pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
    merged = [pair[0] | {"choices": [choice for v in pair for choice in v["choices"]]} for pair in pairs]
    return [*map(frame, merged), done]


def _frames(body: dict[str, Any], index: int, end: End) -> list[bytes]:
    said, last = TOKENS[: end.tokens - 1], TOKENS[end.tokens - 1]
    if "messages" not in body:
        ended = _choice(index, end) | {"text": last}
        goes_on = [{"index": index, "text": text, "logprobs": None, "finish_reason": None} for text in said]
        return [_chunk("text_completion", [choice]) for choice in (*goes_on, ended)]
    # vLLM puts the last token of a stopped choice into the frame that ends it.
    goes_on = [chunk(text, index=index) for text in ("", *said)]
    if end.stop_reason is not None:
        return [*goes_on, chunk(last, "stop", index, stop_reason=end.stop_reason)]
    return [*goes_on, chunk(last, index=index), chunk(None, "stop", index)]


def _message(index: int, end: End) -> dict[str, Any]:
    message = {"role": "assistant", "content": end.said, "refusal": None, "reasoning": None}
    return _choice(index, end) | {"message": message}


def _choice(index: int, end: End) -> dict[str, Any]:
    return {"index": index, "logprobs": None, "finish_reason": "stop", "stop_reason": end.stop_reason}


def _answer(kind: str, choices: list[dict[str, Any]], ends: Sequence[End]) -> dict[str, Any]:
    name = "chatcmpl-1" if kind == "chat.completion" else "cmpl-1"
    head = {"id": name, "object": kind, "created": 1, "model": MODEL}
    return head | {"choices": choices, "usage": _usage(ends)}


def _chunk(kind: str, choices: list[dict[str, Any]], **more: Any) -> bytes:
    return frame({"id": "x", "object": kind, "created": 1, "model": MODEL, "choices": choices} | more)


def _kind(body: dict[str, Any]) -> str:
    return "chat.completion.chunk" if "messages" in body else "text_completion"


def _wants_usage(body: dict[str, Any]) -> bool:
    return bool((body.get("stream_options") or {}).get("include_usage"))


def _usage(ends: Sequence[End]) -> dict[str, int]:
    made = sum(end.tokens for end in ends)
    return {"prompt_tokens": 7, "completion_tokens": made, "total_tokens": 7 + made}
