"""Judging a guarded engine's answers: right ones have no problem, each wrong one has its sentence."""

from __future__ import annotations

import copy

import pytest

from loadtests.gpu.judge import Wanted, problems, summary

WANTED = Wanted([1.0, -1.0, 0.0005], 1e-3, True)


def answer(logit, tokens, decision, action="pass", finish="length", cached=0):
    return {
        "logit": logit,
        "tokens": tokens,
        "decision": decision,
        "action": action,
        "finish": finish,
        "reason": None,
        "cached": cached,
    }


def observed(cached=0):
    return [
        answer(1.0, [1, 2], "refuse", cached=cached),
        answer(-1.0005, [3, 4], "pass"),
        answer(-0.0004, [5, 6], "pass"),
    ]


def guarded(graphs="NONE", compilation="NONE", steps=((2, 3, 0), (1, 3, 0), (0, 0, 0))):
    return {
        "facts": {"graphs": graphs, "compilation": compilation},
        "self_test": None,
        "sites": 3,
        "rounds": [observed(), observed(cached=32)],
        "enforced": [answer(1.0, [], "refuse", "refuse", "stop"), *observed()[1:]],
        "steps": [list(step) for step in steps],
        "left": 0,
    }


PLAIN = {"rounds": [observed(), observed(cached=32)]}
REPLAYED = ((1, 3, 0), (1, 0, 1), (0, 0, 1))


@pytest.mark.parametrize(
    "right",
    [
        guarded(),
        guarded("NONE", "VLLM_COMPILE", ((2, 3, 0), (1, 3, 0), (0, 3, 0))),
        guarded("PIECEWISE", "VLLM_COMPILE", REPLAYED),
        guarded("FULL", "VLLM_COMPILE", REPLAYED),
        guarded("FULL_AND_PIECEWISE", "VLLM_COMPILE", REPLAYED),
        guarded("FULL_DECODE_ONLY", "VLLM_COMPILE", ((1, 3, 0), (0, 0, 1))),
    ],
    ids=lambda right: f"{right['facts']['graphs']}-{right['facts']['compilation']}",
)
def test_right_answers_have_no_problem(right):
    assert problems(right, PLAIN, WANTED) == []
    assert summary(right, PLAIN, WANTED)["round 1: largest difference"] == pytest.approx(9e-4)


def _set(path, value):
    def change(result):
        *parents, last = path
        for key in parents:
            result = result[key]
        result[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_set(["self_test"], "3 of 6 prompts"), "self-test: 3 of 6 prompts"),
        (_set(["rounds", 0, 1, "logit"], -1.002), "round 1: a score is off by 2.00e-03"),
        (_set(["rounds", 1, 1, "logit"], float("nan")), "round 2: a score is off by inf"),
        (_set(["rounds", 0, 1, "logit"], None), "round 1: 1 of 3 requests have no score (no verdict)"),
        (_set(["rounds", 0, 0, "decision"], "pass"), "round 1: 1 of 3 decisions are wrong"),
        (_set(["rounds", 1, 2, "tokens"], [5, 7]), "round 2: 1 of 3 requests got other tokens"),
        (_set(["rounds", 1, 0, "cached"], 0), "round 2: no prefix was cached"),
        (_set(["enforced", 0, "tokens"], [1]), "1 of 1 refused requests show a token"),
        (_set(["enforced", 0, "action"], "pass"), "1 of 1 refused requests"),
        (_set(["enforced", 0, "finish"], "length"), "1 of 1 refused requests"),
        (_set(["enforced", 1, "tokens"], [3]), "1 of 2 passed requests did not get all their tokens"),
        (_set(["left"], 2), "the ledger still holds 2 requests"),
        (_set(["steps", 1, 1], 2), "the taps were not called once each"),
        (_set(["steps", 2, 1], 3), "called in a step in which no prompt ended"),
        (_set(["steps"], [[1, 3, 0]]), "both must occur"),
        (_set(["facts", "graphs"], "PIECEWISE"), "was a replay of a CUDA graph alone"),
        (_set(["facts", "graphs"], "FULL_DECODE_ONLY"), "no step of decode was a replay"),
    ],
)
def test_each_fault_has_its_sentence(change, sentence):
    wrong = copy.deepcopy(guarded())
    change(wrong)
    assert any(sentence in found for found in problems(wrong, PLAIN, WANTED))


def test_an_engine_that_died_before_its_self_test_is_a_problem():
    assert problems({"facts": {}}, PLAIN, WANTED) == ["self-test: it did not get there"]


def test_other_tokens_are_a_number_and_no_fault_where_rounding_may_differ():
    wrong = guarded()
    wrong["rounds"][0][1]["tokens"] = [9, 9]
    assert problems(wrong, PLAIN, WANTED._replace(exact_tokens=False)) == []
    assert summary(wrong, PLAIN, WANTED)["round 1: requests with other tokens than plain vLLM's"] == 1
