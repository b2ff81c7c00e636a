"""Refusals as a client sees them, made by the gateway alone: no byte of an upstream body goes in.

Style ``message`` reads like an answer: the text stands in ``content`` and in ``refusal``, the reason is
``stop``. Style ``content_filter`` has no content and the finish reason ``content_filter``, at which OpenAI's
SDK raises from ``.parse()`` and ``.stream()`` with a response format. Text completions have no ``refusal``.

Styles ``azure`` and ``error`` are errors, also for streams, which then have no frame: Azure OpenAI's body for
a filtered prompt, and OpenAI's error body. Choices that were stopped as they grew (``service.stops``) stand
in an answer also in these styles, and then end like ``content_filter``, as filtered ones do at Azure.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from service.errors import error_body
from service.policy import Refusal

Route = Literal["chat", "text"]

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class RefusedChoice:
    """One choice that holds a refusal and nothing else."""

    route: Route
    refusal: Refusal
    index: int

    def whole(self) -> dict[str, Any]:
        """As it stands in an answer to a request without ``stream``."""
        if self.route == "text":
            return self._of_text(self._content, finish_reason(self.refusal))
        message = {"role": "assistant", "content": self._content, "refusal": self.refusal.text}
        return {
            "index": self.index,
            "message": message,
            "logprobs": None,
            "finish_reason": finish_reason(self.refusal),
            **filter_results(self.refusal),
        }

    def chunks(self) -> Iterator[dict[str, Any]]:
        """As it stands in the frames of a stream, one after another."""
        reason = finish_reason(self.refusal)
        if self.route == "text":
            yield self._of_text(self._content, None)
            yield self._of_text("", reason)
            return
        yield self._of_chat({"role": "assistant", "content": ""})
        # Both in one delta: a client that parses the content as JSON must know at once that it is a refusal.
        delta = {"content": self._content} if self._content else {}
        yield self._of_chat(delta | {"refusal": self.refusal.text})
        yield self._of_chat({}, reason) | filter_results(self.refusal)

    @property
    def _content(self) -> str:
        return self.refusal.text if self.refusal.style == "message" else ""

    def _of_text(self, text: str, reason: str | None) -> dict[str, Any]:
        found = filter_results(self.refusal) if reason is not None else {}
        return {"index": self.index, "text": text, "logprobs": None, "finish_reason": reason, **found}

    def _of_chat(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": reason}


@dataclass(frozen=True)
class RefusedAnswer:
    """Everything that the shape of one refusal depends on."""

    route: Route
    refusal: Refusal
    request_id: str
    model: str
    siblings: int
    prompt_tokens: int
    moderation: dict[str, Any] | None = None
    """OpenAI's member of this name, for clients that asked for it."""
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self) -> dict[str, Any]:
        """The answer to a request without ``stream``."""
        choices = [choice.whole() for choice in self._choices]
        return self._envelope(choices, chunk=False) | {"usage": self._usage()} | self._moderation

    def frames(self, *, include_usage: bool) -> Iterator[bytes]:
        """The frames of a stream, ``[DONE]`` included."""
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        for refused in self._choices:
            for choice in refused.chunks():
                yield _frame(self._envelope([choice], chunk=True) | usage)
        if self.moderation is not None:
            yield _frame(self._envelope([], chunk=True) | usage | self._moderation)
        if include_usage:
            yield _frame(self._envelope([], chunk=True) | {"usage": self._usage()})
        yield DONE

    def error(self) -> tuple[int, dict[str, Any]] | None:
        """HTTP status and body, for the styles that are errors."""
        if self.refusal.style == "error":
            return refusal_error(self.refusal)
        if self.refusal.style == "azure":
            return 400, azure_body(self.refusal.text)
        return None

    @property
    def _moderation(self) -> dict[str, Any]:
        return {"moderation": self.moderation} if self.moderation is not None else {}

    @property
    def _choices(self) -> list[RefusedChoice]:
        return [RefusedChoice(self.route, self.refusal, index) for index in range(self.siblings)]

    def _envelope(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        if self.route == "text":
            prefix, kind = "cmpl", "text_completion"
        else:
            prefix, kind = "chatcmpl", "chat.completion.chunk" if chunk else "chat.completion"
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": 0,
            "total_tokens": self.prompt_tokens,
        }


def finish_reason(refusal: Refusal) -> str:
    """How a choice ends that is refused, or was stopped."""
    return "stop" if refusal.style == "message" else "content_filter"


def refusal_error(refusal: Refusal) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of the style ``error``."""
    return refusal.status, error_body(
        refusal.text, kind="invalid_request_error", code="content_policy_violation"
    )


def filter_results(refusal: Refusal) -> dict[str, Any]:
    """What Azure OpenAI adds to a choice of an answer that it has filtered; nothing in other styles."""
    return {"content_filter_results": _azure_kinds()} if refusal.style == "azure" else {}


def azure_body(text: str) -> dict[str, Any]:
    """Azure OpenAI's error for a filtered prompt, whose shape clients of Azure look for.

    Its four categories are there and not filtered: the guard says whether, not of what kind. The finding is
    the category ``unsafe``.
    """
    inner = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": _azure_kinds()}
    error = error_body(text, kind="invalid_request_error", code="content_filter", param="prompt")["error"]
    return {"error": error | {"status": 400, "innererror": inner}}


def _azure_kinds() -> dict[str, Any]:
    safe = {"filtered": False, "severity": "safe"}
    kinds: dict[str, Any] = dict.fromkeys(("hate", "self_harm", "sexual", "violence"), safe)
    return kinds | {"unsafe": {"filtered": True, "detected": True}}


def _frame(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
