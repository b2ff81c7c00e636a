"""The second supported layout: Qwen3, with its normalised queries and keys."""

import numpy as np
import pytest

from guard.bundle import Bundle
from guard.engine import selftest
from tests.e2e.inprocess import ask, guarded, sampling, shut_down
from tests.engine import world


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return world.make_model(tmp_path_factory.mktemp("qwen3") / "model", "qwen3")


@pytest.fixture(scope="module")
def bundle_dir(qwen3):
    world.make_bundle(qwen3.parent / "bundle", qwen3)
    return qwen3.parent / "bundle"


@pytest.fixture(scope="module")
def llm(qwen3, bundle_dir):
    made = guarded(qwen3, bundle_dir)
    selftest.run(made, Bundle.load(bundle_dir).card.self_test.prompts)
    yield made
    shut_down(made)


def test_logits_equal_transformers_and_decide(llm, qwen3, bundle_dir):
    bundle, reference = Bundle.load(bundle_dir), world.make_reference(qwen3)
    prompts = world.prompts(60, seed=61, longest=250)
    expected = bundle.logits(np.stack([reference.features(p) for p in prompts]))
    for got, logit in zip(ask(llm, prompts, sampling(ignore_eos=True)), expected, strict=True):
        assert got.verdict.logit == pytest.approx(logit, abs=1e-3)
        if abs(logit) > 0.01:
            assert (got.verdict.action, len(got.tokens)) == (("refuse", 0) if logit > 0 else ("pass", 12))
