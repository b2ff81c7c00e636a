"""A sequence probe with speculative decoding: of an answer, the tokens that were accepted count."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from guard.engine import selftest
from guard.engine.config import AUDIENCE_ENV, KEY_FILE_ENV
from guard.monitor import Monitor
from guard.pooling import Pooling
from guard.verdict import Decision, Directive
from loadtests.random_model import with_sequence_probe
from tests.e2e.inprocess import ask, guarded, sampling, shut_down
from tests.engine import world

LOOKUP = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
OBSERVE = Decision(policy="test", mode="observe", rules=())
# One alarming token is enough for this one: a draft that was not accepted would show.
SOFTMAX = Pooling(kind="softmax", temperature=0.1)


@pytest.fixture(scope="module")
def bundle(tiny_bundle, reference):
    return with_sequence_probe(tiny_bundle, reference, SOFTMAX, world.prompts(60, seed=1000))


@pytest.fixture(scope="module")
def llm(bundle, tiny_model, key_file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_FILE_ENV, str(key_file))
        patch.setenv(AUDIENCE_ENV, "engine")
        directory = bundle.save(tiny_model.parent / "softmax-bundle")
        llm = guarded(tiny_model, directory, speculative_config=LOOKUP)
        selftest.run(llm, bundle.card.self_test.prompts)
        yield llm
        shut_down(llm)
    # vLLM's lookup imports numba, and the next engine of this process stumbles over llvmlite's namespaces
    # when it looks through all modules for its kernels.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("llvmlite", "numba")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def seal(keys):
    return lambda decision: Directive.issue(decision, audience="engine", body=b"").seal(keys)


def test_later_turns_see_no_draft_that_was_not_accepted(llm, bundle, reference, seal):
    """Prompts that repeat themselves, so that there is something to look up."""
    first = [(p[:7] * 20)[: max(20, len(p))] for p in world.prompts(8, seed=73, longest=120)]
    answers = ask(llm, first, sampling(seal(OBSERVE), max_tokens=80, ignore_eos=True))
    drafted, accepted = (
        next(m.value for m in llm.get_metrics() if m.name == f"vllm:spec_decode_num_{name}_tokens")
        for name in ("draft", "accepted")
    )
    assert 20 <= accepted < drafted - 20
    later = [p + a.tokens + [5, 6] for p, a in zip(first, answers, strict=True)]
    again = ask(llm, later, sampling(seal(OBSERVE)))
    assert all(a.cached > len(p) for p, a in zip(first, again, strict=True))
    expected = [bundle.sequence.logit(reference.features_of_all(p)) for p in later]
    np.testing.assert_allclose([a.verdict.logit for a in again], expected, atol=1e-3)


def test_answers_are_not_watched(llm, seal):
    """Of a step's tokens it is known only afterwards which were accepted: such an order fails closed."""
    watched = OBSERVE.model_copy(update={"monitor": Monitor(logit=0.0)})
    (answer,) = ask(llm, world.prompts(1), sampling(seal(watched)))
    assert (answer.finish_reason, answer.verdict.reason) == ("error", "directive_no_monitor")
