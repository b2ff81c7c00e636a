"""Answers that the engine stopped as they grew (``guard.monitor``): what clients see, and who is told.

The engine ends a stopped choice like any other, with a seal in ``stop_reason`` that names the request's
directive. The gateway believes nothing else, and the seal never reaches a client. What such a choice then
looks like depends on the policy's ``monitor.text``:

- ``keep``: the text so far stays. The choice ends as a refusal of the policy's style does, and in chats its
  message has a ``refusal``, without which a client could take half a JSON object for a whole one.
- ``withdraw``: the choice is replaced by the refusal. In a stream that can only be done before its first
  byte, so the stream is held back until it has ended (``service.relay``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from guard.monitor import STOPPED, Stop
from service.exchange import Judged
from service.metrics import stop_labels
from service.refusal import RefusedChoice, Route, filter_results, finish_reason, refusal_error
from service.stream import AnswerWatch, data_of, parse_json_object

_MARK = f'"{STOPPED}:'.encode()


class Stops:
    """Finds the stops of one answer, tells audit and metrics, and writes the choices as the policy says."""

    def __init__(self, judged: Judged, route: Route) -> None:
        self._call, self._nonce, self._route = judged.call, judged.nonce, route
        self._refusal = judged.call.bound.policy.refusal
        watched = judged.decision.monitor is not None and judged.decision.mode == "enforce"
        monitor = judged.call.bound.policy.monitor
        self.withdraws = watched and monitor is not None and monitor.text == "withdraw"
        """Whether nothing may be shown of a choice that was stopped."""
        self.found: dict[int, Stop] = {}
        """By the index of the choice."""
        if watched:
            self._call.record.stopped = 0

    def of_answer(self, value: dict[str, Any]) -> dict[str, Any] | None:
        """A whole answer as the client may see it; None when none of its choices was stopped."""
        choices = [self._of_choice(choice) for choice in value["choices"]]
        return value | {"choices": choices} if self.found else None

    def of_frame(self, frame: bytes) -> bytes:
        """A frame of a stream as the client may see it; byte for byte unless it ends a stopped choice.

        Where stopped choices are withdrawn, frames are only looked at: ``withdrawn`` comes at the end.
        """
        value = parse_json_object(data_of(frame) or b"") if _MARK in frame else None
        if value is None or not isinstance(value.get("choices"), list):
            return frame
        choices = [self._of_choice(choice) for choice in value["choices"]]
        if self.withdraws or choices == value["choices"]:
            return frame
        return _frame(value | {"choices": choices})

    def withdrawn(self, frames: Iterable[bytes], watch: AnswerWatch) -> Iterator[bytes]:
        """The frames of a stream that has ended, with a refusal in place of every choice that was stopped."""
        for frame in frames:
            value = parse_json_object(data_of(frame) or b"")
            choices = value.get("choices") if value is not None else None
            stopped = [choice for choice in choices or () if choice.get("index") in self.found]
            if value is None or not choices or not stopped:
                yield frame
                continue
            for choice in stopped:
                if choice.get("finish_reason") is not None:
                    for written in self._refused(choice["index"]).chunks():
                        yield watch.chunk({"choices": [written]})
            left = [choice for choice in choices if choice not in stopped]
            if left:
                yield _frame(value | {"choices": left})

    def error(self, siblings: int) -> tuple[int, dict[str, Any]] | None:
        """HTTP status and body, if all choices are withdrawn in the style that is an error."""
        if not self.withdraws or self._refusal.style != "error" or len(self.found) < siblings:
            return None
        status, body = refusal_error(self._refusal)
        self._call.record.code = body["error"]["code"]
        return status, body

    def _of_choice(self, choice: Any) -> Any:
        stop = self._stop_of(choice)
        if stop is None:
            return choice
        self._tell(stop)
        self.found[choice["index"]] = stop
        return self._refused(choice["index"]).whole() if self.withdraws else self._kept(choice)

    def _stop_of(self, choice: Any) -> Stop | None:
        if not isinstance(choice, dict) or not isinstance(choice.get("index"), int):
            return None
        return Stop.of_reason(choice.get("stop_reason"), self._call.gateway.keys, nonce=self._nonce)

    def _kept(self, choice: dict[str, Any]) -> dict[str, Any]:
        ended = {"finish_reason": finish_reason(self._refusal), "stop_reason": None}
        kept = choice | ended | filter_results(self._refusal)
        for member in ("message", "delta"):
            if isinstance(choice.get(member), dict):
                kept[member] = choice[member] | {"refusal": self._refusal.text}
        return kept

    def _refused(self, index: int) -> RefusedChoice:
        return RefusedChoice(self._route, self._refusal, index)

    def _tell(self, stop: Stop) -> None:
        call, metrics = self._call, self._call.gateway.metrics
        record = call.record
        record.stopped = (record.stopped or 0) + 1
        record.stopped_after = min(stop.tokens, record.stopped_after or stop.tokens)
        if call.gateway.settings.audit_scores:
            highest = record.stopped_logit
            record.stopped_logit = stop.logit if highest is None else max(highest, stop.logit)
        metrics.stopped.labels(*stop_labels(call.bound, call.model)).inc()
        metrics.stopped_after.labels(call.model).observe(stop.tokens)


def _frame(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
