"""A sequence probe with speculative decoding: of an answer, the tokens that were accepted count."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.bundle import Bundle
from guard.engine import selftest
from guard.engine.config import AUDIENCE_ENV, KEY_FILE_ENV
from guard.monitor import Monitor
from guard.pooling import Pooling
from guard.verdict import Decision, Directive
from loadtests.random_model import with_sequence_probe
from tests.e2e.inprocess import Answer, ask, guarded, sampling
from tests.engine import world

LOOKUP = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
OBSERVE = Decision(policy="test", mode="observe", rules=())
# One alarming token is enough for this one: a draft that was not accepted would show.
SOFTMAX = Pooling(kind="softmax", temperature=0.1)
# The engine, in the process that has it.
LLM: list[Any] = []


@pytest.fixture(scope="module")
def bundle(tiny_bundle, reference):
    return with_sequence_probe(tiny_bundle, reference, SOFTMAX, world.prompts(60, seed=1000))


@pytest.fixture(scope="module")
def engine(bundle, tiny_model, key_file):
    """An engine in a process of its own.

    vLLM's lookup leaves two OpenMP threads where there was one (numba), and vLLM's CPU worker has made
    ``torch.set_num_threads`` do nothing: fits of later tests would not repeat to the last digit.
    """
    directory = bundle.save(tiny_model.parent / "softmax-bundle")
    apart = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, apart, start, (tiny_model, directory, key_file)) as pool:
        yield pool


def start(model: Path, bundle: Path, key_file: Path) -> None:
    os.environ.update({KEY_FILE_ENV: str(key_file), AUDIENCE_ENV: "engine"})
    LLM.append(guarded(model, bundle, speculative_config=LOOKUP))
    selftest.run(LLM[0], Bundle.load(bundle).card.self_test.prompts)


def asked(prompts: list[list[int]], directive: str, options: dict[str, Any]) -> tuple[list[Answer], int, int]:
    """What ``prompts`` got, and how many tokens were drafted and accepted since the start."""
    answers = ask(LLM[0], prompts, sampling(directive, **options))
    drafted, accepted = (
        next(m.value for m in LLM[0].get_metrics() if m.name == f"vllm:spec_decode_num_{name}_tokens")
        for name in ("draft", "accepted")
    )
    return [replace(answer, output=None) for answer in answers], drafted, accepted


@pytest.fixture(scope="module")
def send(engine, keys):
    def send(prompts, decision, **options):
        directive = Directive.issue(decision, audience="engine", body=b"").seal(keys)
        return engine.submit(asked, prompts, directive, options).result(timeout=600)

    return send


def test_later_turns_see_no_draft_that_was_not_accepted(send, bundle, reference):
    """Prompts that repeat themselves, so that there is something to look up."""
    first = [(p[:7] * 20)[: max(20, len(p))] for p in world.prompts(8, seed=73, longest=120)]
    answers, drafted, accepted = send(first, OBSERVE, max_tokens=80, ignore_eos=True)
    assert 20 <= accepted < drafted - 20
    later = [p + a.tokens + [5, 6] for p, a in zip(first, answers, strict=True)]
    again, *_ = send(later, OBSERVE)
    assert all(a.cached > len(p) for p, a in zip(first, again, strict=True))
    expected = [bundle.sequence.logit(reference.features_of_all(p)) for p in later]
    np.testing.assert_allclose([a.verdict.logit for a in again], expected, atol=1e-3)


def test_answers_are_not_watched(send):
    """Of a step's tokens it is known only afterwards which were accepted: such an order fails closed."""
    watched = OBSERVE.model_copy(update={"monitor": Monitor(logit=0.0)})
    (answer,), *_ = send(world.prompts(1), watched)
    assert (answer.finish_reason, answer.verdict.reason) == ("error", "directive_no_monitor")
