"""One HTTP request at the engine's API server: its directive, its engine requests, its binding verdict.

An HTTP request expands to one or more engine requests (``n``, several prompts). They are siblings: the worst
of their verdicts binds all of them. A verdict that stops the request binds at once; a pass binds only when
every expected sibling has been judged. No vLLM here.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from contextvars import ContextVar
from functools import reduce
from typing import Literal

from guard.sealed import Keyring
from guard.verdict import Directive, DirectiveError, Verdict

MAX_REMEMBERED_NONCES = 1_000_000

Source = Literal["gateway", "direct", "self-test"]


class Exchange:
    """State of one HTTP request. Without a directive it only collects, so that verdicts can be counted."""

    def __init__(self, source: Source, directive: Directive | None = None, sealed: str | None = None) -> None:
        self.source = source
        self.directive = directive
        self.sealed = sealed
        self.decided = asyncio.Event()
        """Set as soon as ``binding`` is."""
        self.binding: Verdict | None = None
        self.request_ids: set[str] = set()
        """All engine requests made for this HTTP request so far."""
        self._prompts: dict[str, int] = {}
        self._verdicts: dict[str, Verdict] = {}

    def register(self, request_id: str, *, prompt_id: str, prompt_tokens: int) -> None:
        """An engine request was made. ``prompt_id`` is the same for siblings of one prompt."""
        self.request_ids.add(request_id)
        self._prompts[prompt_id] = prompt_tokens

    def record(self, request_id: str, verdict: Verdict) -> bool:
        """Take the verdict of an engine request; False when it was already known."""
        if request_id in self._verdicts:
            return False
        self._verdicts[request_id] = verdict
        expected = self.directive.siblings if self.directive else 1
        if len(self.request_ids) > expected:
            self._bind(_error(verdict, "more_siblings_than_directed"))
        elif verdict.action in ("refuse", "error") or len(self._verdicts) == expected:
            self._bind(reduce(Verdict.worse_of, self._verdicts.values()))
        return True

    def _bind(self, verdict: Verdict) -> None:
        if self.binding is None:
            whole = {
                "prompt_tokens": sum(self._prompts.values()),
                "unscored_shape": any(judged.unscored_shape for judged in self._verdicts.values()),
            }
            self.binding = verdict.model_copy(update=whole)
            self.decided.set()


def _error(verdict: Verdict, reason: str) -> Verdict:
    return verdict.model_copy(update={"action": "error", "decision": None, "unsafe": True, "reason": reason})


CURRENT: ContextVar[Exchange | None] = ContextVar("neuronguard_exchange", default=None)
"""The exchange of the HTTP request that the running task belongs to."""


class Admission:
    """Checks a directive where the body is seen: signature, audience, expiry, body, single use."""

    def __init__(self, keys: Keyring | None, audience: str) -> None:
        self._keys = keys
        self._audience = audience
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._offset = time.time() - time.monotonic()

    def admit(self, sealed: str, body: bytes, now: float | None = None) -> Directive:
        """Return the directive, whose nonce is spent by this call. Raises DirectiveError."""
        # The clock of the machine may be set back, which must not make a spent directive a fresh one.
        steady = time.monotonic() + self._offset if now is None else now
        now = max(time.time(), steady) if now is None else now
        if self._keys is None:
            raise DirectiveError("no_key_file")
        directive = Directive.open(sealed, self._keys, audience=self._audience)
        if directive.expires < now:
            raise DirectiveError("expired")
        if directive.body_sha256 != hashlib.sha256(body).hexdigest():
            raise DirectiveError("wrong_body")
        self._forget(steady)
        if directive.nonce in self._seen:
            raise DirectiveError("replayed")
        if len(self._seen) >= MAX_REMEMBERED_NONCES:
            raise DirectiveError("too_many_live_directives")
        self._seen[directive.nonce] = directive.expires
        return directive

    def _forget(self, steady: float) -> None:
        # Expired nonces cannot come back. Lifetimes are about equal, so the oldest expire first; one that
        # expires out of order is only kept a little longer.
        while self._seen and next(iter(self._seen.values())) < steady:
            self._seen.popitem(last=False)
