"""Check only: prompts are prefilled and scored, and nothing is generated.

Every input is an engine request of its own under the caller's policy, in the engine's mode ``check``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from guard.verdict import Decision, RuleAction, Verdict
from service.errors import bad_request, unavailable
from service.exchange import Forward, decide, exchange
from service.gateway import Call, unless_gone
from service.judge import turns_of
from service.strict_json import dump

AT_ONCE = 8
"""Inputs of one request that are at the engine at one time."""

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """What was found about one input."""

    verdict: Verdict
    decision: RuleAction
    """What the policy says; where its rule is ``escalate``, what the judge made of it."""

    @property
    def flagged(self) -> bool:
        """Whether the policy says anything but ``pass``."""
        return self.decision != "pass"

    def blocked(self, call: Call) -> bool:
        """Whether a gateway that asked must not answer: the policy refuses, and does not merely observe."""
        return self.decision == "refuse" and call.bound.decision.mode == "enforce"


def headers(call: Call) -> dict[str, str]:
    """What every answer of a check-only route says of itself."""
    return {"x-guard-action": "checked", "x-guard-policy": call.bound.name}


def limit_inputs(call: Call, count: int, param: str) -> None:
    """Raises ApiError 400 for more inputs than one request may hold."""
    limit = call.gateway.settings.max_moderation_inputs
    if count > limit:
        raise bad_request(f"At most {limit} inputs can be checked with one request.", param=param)


def of_user(content: str | list[dict[str, str]]) -> Messages:
    """A conversation that consists of one message of a user."""
    return [{"role": "user", "content": content}]


async def check_all(call: Call, inputs: Sequence[Messages]) -> list[Finding]:
    """Judge several conversations; all are judged, or the request fails. Raises ApiError, ClientGoneError."""
    if not inputs:
        return []
    findings = await unless_gone(call.arrival.request.receive, _check_all(call, inputs))
    worst = reduce(Verdict.worse_of, (finding.verdict for finding in findings))
    call.record.verdict = worst.decision
    return findings


async def _check_all(call: Call, inputs: Sequence[Messages]) -> list[Finding]:
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(messages: Messages) -> Finding:
        async with turn:
            return await _check(call, messages)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(messages)) for messages in inputs]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _checking(decision: Decision) -> Decision:
    return decision.model_copy(update={"mode": "check"})


async def _check(call: Call, messages: Messages) -> Finding:
    body = {"model": call.model, "messages": messages}
    forward = Forward(
        path="/v1/chat/completions",
        body=dump(body | {"max_tokens": 1} | call.cache_salt),
        siblings=1,
        stream=False,
        order=_checking,
        turns=lambda: turns_of(body),
    )
    judged = await exchange(call, forward)
    await judged.answer.close()
    verdict = judged.verdict
    if verdict is None or verdict.decision is None:
        # There is nothing to answer with, whatever the policy lets through elsewhere.
        raise unavailable(
            "The request could not be checked. Try again later.", code="guard_no_verdict", stage="verdict"
        )
    decision = verdict.decision
    if decision == "escalate":
        decision = await decide(judged.call, forward, verdict)
    return Finding(verdict, decision)
