"""Every further architecture: the engine scores what transformers computes. One engine each."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import Olmo2Model

from guard.bundle import Bundle
from guard.capture import read_prompts
from guard.checkpoint import Checkpoint
from guard.engine import selftest
from loadtests.random_model import Reference
from tests.e2e.inprocess import ask, guarded, sampling, scheduler, shut_down
from tests.engine import architectures, world


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model and bundle directories by kind, each made once."""
    found = {}

    def make(kind):
        if kind not in found:
            root = tmp_path_factory.mktemp(kind)
            model = architectures.make_model(root / "model", kind)
            architectures.make_bundle(root / "bundle", model)
            found[kind] = model, root / "bundle"
        return found[kind]

    return make


@pytest.fixture
def transformers_as_before():
    """Where vLLM runs transformers' layers it leaves its constructor on their class; take it off again."""
    cls = Olmo2Model
    bases, own = cls.__bases__, dict(vars(cls))
    yield
    cls.__bases__ = bases
    for name, value in list(vars(cls).items()):
        if name not in own:
            delattr(cls, name)
        elif value is not own[name]:
            setattr(cls, name, own[name])


@pytest.mark.usefixtures("transformers_as_before")
@pytest.mark.parametrize("kind", sorted(architectures.SIZES))
def test_scores_equal_transformers(made, kind):
    """Whole and chunked (longer than 96 tokens), uncached and cached; then the verdict."""
    model, directory = made(kind)
    bundle = Bundle.load(directory)
    prompts = world.prompts(32, seed=61, longest=250)
    assert sum(len(prompt) > 96 for prompt in prompts) >= 14
    offline = Checkpoint.open(model).load_model()
    expected = bundle.logits(read_prompts(offline, architectures.SITES, prompts))
    assert expected.std() > 0.3
    llm = guarded(model, directory)
    try:
        selftest.run(llm, bundle.card.self_test.prompts)
        for turn in ("uncached", "cached"):
            answers = [got for prompt in prompts for got in first(llm, [prompt], turn)]
            assert np.abs(logits(answers) - expected).max() <= 1e-3, turn
            cached = sum(got.cached > 0 for got in answers)
            assert cached == 0 if turn == "uncached" else cached >= 14
        together = ask(llm, prompts, sampling(ignore_eos=True))
        assert np.abs(logits(together) - expected).max() <= 1e-3
        for got, logit in zip(together, expected, strict=True):
            if abs(logit) > 0.01:
                action = ("refuse", 0) if logit > 0 else ("pass", 12)
                assert (got.verdict.action, len(got.tokens)) == action
    finally:
        shut_down(llm)


def first(llm, prompts, turn):
    """Ask with an empty prefix cache, or a second time."""
    if turn == "uncached":
        scheduler(llm).reset_prefix_cache()
    else:
        ask(llm, prompts, sampling(max_tokens=1))
    return ask(llm, prompts, sampling(max_tokens=1))


def logits(answers):
    return np.array([got.verdict.logit for got in answers])


@pytest.mark.parametrize("kind", architectures.WINDOWED)
def test_the_window_is_one_that_matters(made, kind):
    """Without it the test above would have to see other scores."""
    model, directory = made(kind)
    bundle, reference = Bundle.load(directory), Reference(model, architectures.SITES)
    prompts = [prompt for prompt in world.prompts(30, seed=61, longest=250) if len(prompt) > 96]
    narrow = bundle.logits(np.stack([reference.features(p) for p in prompts]))
    reference.model.config.sliding_window = 4096
    wide = bundle.logits(np.stack([reference.features(p) for p in prompts]))
    assert np.abs(narrow - wide).min() > 1e-3


def test_soft_capping_is_such_that_it_matters(made):
    model, directory = made("gemma2")
    bundle, reference = Bundle.load(directory), Reference(model, architectures.SITES)
    prompts = world.prompts(30, seed=61, shortest=20, longest=250)[::3]
    capped = bundle.logits(np.stack([reference.features(p) for p in prompts]))
    reference.model.set_attn_implementation("sdpa")
    free = bundle.logits(np.stack([reference.features(p) for p in prompts]))
    assert np.abs(capped - free).min() > 1e-3
