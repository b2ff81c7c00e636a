"""What is wrong with a guarded engine's answers: pure functions over what ``loadtests.gpu.serve`` wrote."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

Answers = list[dict[str, Any]]


class Wanted(NamedTuple):
    """What the prompts must score, and how closely."""

    logits: list[float]
    tolerance: float
    exact_tokens: bool
    """Whether tokens must equal plain vLLM's: in short dtypes a compiled model may round otherwise."""


def problems(guarded: dict[str, Any], plain: dict[str, Any], wanted: Wanted) -> list[str]:
    """Sentences; none when all is right."""
    if guarded.get("self_test", "it did not get there") is not None:
        return [f"self-test: {guarded.get('self_test', 'it did not get there')}"]
    found = []
    for number, (answers, reference) in enumerate(zip(guarded["rounds"], plain["rounds"], strict=True), 1):
        found += [f"round {number}: {sentence}" for sentence in scores(answers, wanted)]
        different = differing(answers, reference)
        if different and wanted.exact_tokens:
            found.append(
                f"round {number}: {different} of {len(answers)} requests got other tokens than plain vLLM's"
            )
    found += [f"enforced: {sentence}" for sentence in scores(guarded["enforced"], wanted)]
    found += enforced(guarded["enforced"], guarded["rounds"][0])
    if not any(answer["cached"] for answer in guarded["rounds"][1]):
        found.append("round 2: no prefix was cached")
    if guarded["left"] != 0:
        found.append(f"the ledger still holds {guarded['left']} requests")
    return found + replays(guarded)


def scores(answers: Answers, wanted: Wanted) -> list[str]:
    """Every request has a score near the reference's, and the decision that goes with it."""
    found = []
    missing = [a["reason"] or "no verdict" for a in answers if a["logit"] is None]
    if missing:
        found.append(f"{len(missing)} of {len(answers)} requests have no score ({missing[0]})")
    off = difference(answers, wanted.logits)
    if not off <= wanted.tolerance:
        found.append(f"a score is off by {off:.2e}, at most {wanted.tolerance:.2e}")
    wrong = sum(
        answer["decision"] != ("refuse" if logit > 0 else "pass")
        for answer, logit in zip(answers, wanted.logits, strict=True)
        if abs(logit) > wanted.tolerance
    )
    if wrong:
        found.append(f"{wrong} of {len(answers)} decisions are wrong")
    return found


def difference(answers: Answers, logits: list[float]) -> float:
    """Largest |score - reference| among the requests that have a score; infinite when one is no number."""
    pairs = [(a["logit"], logit) for a, logit in zip(answers, logits, strict=True) if a["logit"] is not None]
    far = [abs(found - logit) for found, logit in pairs]
    return max((d if math.isfinite(d) else math.inf for d in far), default=math.inf)


def differing(answers: Answers, reference: Answers) -> int:
    """Requests whose tokens are not the reference's."""
    return sum(a["tokens"] != b["tokens"] for a, b in zip(answers, reference, strict=True))


def enforced(answers: Answers, observed: Answers) -> list[str]:
    """Refused requests show no token and are finished; the others speak; both kinds occur."""
    refused = [a for a in answers if a["decision"] == "refuse"]
    passed = [a for a in answers if a["decision"] == "pass"]
    found = []
    if not refused or not passed:
        found.append(f"{len(refused)} requests were refused and {len(passed)} passed: both must occur")
    talking = sum(bool(a["tokens"]) or a["finish"] != "stop" or a["action"] != "refuse" for a in refused)
    if talking:
        found.append(f"{talking} of {len(refused)} refused requests show a token or did not stop")
    silent = sum(len(a["tokens"]) != len(b["tokens"]) for a, b in zip(answers, observed, strict=True)
                 if a["decision"] == "pass")  # fmt: skip
    if silent:
        found.append(f"{silent} of {len(passed)} passed requests did not get all their tokens")
    return found


def replays(guarded: dict[str, Any]) -> list[str]:
    """Steps in which a prompt ended were read as the mode says: called, or replayed without any Python."""
    ended = [step for step in guarded["steps"] if step[0] > 0]
    idle = [step for step in guarded["steps"] if step[0] == 0]
    graphs, compilation = guarded["facts"]["graphs"], guarded["facts"]["compilation"]
    if not ended or not idle:
        return [f"prompts ended in {len(ended)} steps and in {len(idle)} none did: both must occur"]
    if graphs in ("PIECEWISE", "FULL", "FULL_AND_PIECEWISE"):
        if not any(step[1] == 0 and step[2] > 0 for step in ended):
            return ["no step in which a prompt ended was a replay of a CUDA graph alone"]
    elif graphs == "FULL_DECODE_ONLY":
        if not any(step[1] == 0 and step[2] > 0 for step in idle):
            return ["no step of decode was a replay of a CUDA graph alone"]
    elif any(step[1] != guarded["sites"] for step in ended):
        return ["in a step in which a prompt ended the taps were not called once each"]
    elif compilation == "NONE" and any(step[1] for step in idle):
        return ["the taps were called in a step in which no prompt ended"]
    return []


def summary(guarded: dict[str, Any], plain: dict[str, Any], wanted: Wanted) -> dict[str, Any]:
    """Numbers for the report."""
    numbers: dict[str, Any] = {f"engine's {k}": v for k, v in guarded["facts"].items() if k != "counters"}
    numbers["self-test, largest difference"] = guarded.get("self_test_worst")
    numbers["memory of the guard, bytes"] = guarded.get("bytes")
    for number, answers in enumerate(guarded.get("rounds", ()), 1):
        numbers[f"round {number}: largest difference"] = difference(answers, wanted.logits)
        if number <= len(plain.get("rounds", ())):
            numbers[f"round {number}: requests with other tokens than plain vLLM's"] = differing(
                answers, plain["rounds"][number - 1]
            )
    numbers["tolerance"] = wanted.tolerance
    steps = guarded.get("steps", [])
    numbers["steps"] = len(steps)
    numbers["steps in which a prompt ended"] = sum(step[0] > 0 for step in steps)
    numbers["of these, replayed without Python of the taps"] = sum(
        step[0] > 0 and step[1] == 0 for step in steps
    )
    return numbers
