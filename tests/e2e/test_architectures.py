"""Every further architecture: the engine scores what transformers computes. One engine each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Olmo2Model

from guard.bundle import Bundle
from guard.capture import read_prompts
from guard.checkpoint import Checkpoint
from guard.engine import selftest
from loadtests.random_model import Reference
from tests.e2e.inprocess import ask, guarded, sampling, scheduler, shut_down
from tests.engine import architectures, world

PROMPTS = 61


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model and bundle directories by kind, each made once."""
    found = {}

    def make(kind):
        if kind not in found:
            root = tmp_path_factory.mktemp(kind)
            model = architectures.make_model(root / "model", kind)
            architectures.make_bundle(root / "bundle", model, kind)
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
    prompts = world.prompts(32, seed=PROMPTS, longest=250)
    assert sum(len(prompt) > 96 for prompt in prompts) >= 14
    offline = Checkpoint.open(model).load_model()
    expected = bundle.logits(read_prompts(offline, architectures.sites(kind), prompts))
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
    prompts = [prompt for prompt in world.prompts(30, seed=PROMPTS, longest=250) if len(prompt) > 96]
    narrow = bundle.logits(np.stack([reference.features(p) for p in prompts]))
    reference.model.config.sliding_window = 4096
    wide = bundle.logits(np.stack([reference.features(p) for p in prompts]))
    assert np.abs(narrow - wide).min() > 1e-3


@pytest.mark.parametrize("kind", architectures.SCALED)
def test_the_scaling_of_angles_is_one_that_matters(made, kind, tmp_path):
    model, directory = made(kind)
    bundle = Bundle.load(directory)
    plain = architectures.make_model(tmp_path / "plain", kind, rope_parameters={"rope_theta": 10000.0})
    prompts = world.prompts(30, seed=61, shortest=20, longest=250)[::3]
    scaled, unscaled = (
        bundle.logits(np.stack([Reference(path, architectures.SITES).features(p) for p in prompts]))
        for path in (model, plain)
    )
    assert np.abs(scaled - unscaled).min() > 1e-3


def test_soft_capping_is_such_that_it_matters(made):
    model, directory = made("gemma2")
    bundle, reference = Bundle.load(directory), Reference(model, architectures.SITES)
    prompts = world.prompts(30, seed=PROMPTS, shortest=20, longest=250)[::3]
    capped = bundle.logits(np.stack([reference.features(p) for p in prompts]))
    reference.model.set_attn_implementation("sdpa")
    free = bundle.logits(np.stack([reference.features(p) for p in prompts]))
    assert np.abs(capped - free).min() > 1e-3


class Routers:
    """The closest decision of every router: score of the last expert taken, less that of the next."""

    def __init__(self, model):
        self.margins = []
        config = model.config
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_pre_hook(self.look)
        self.chosen = config.num_experts_per_tok
        self.score = torch.sigmoid if config.model_type == "glm4_moe" else torch.nn.Identity()

    def look(self, router, args):
        scores = self.score(torch.nn.functional.linear(args[0].flatten(0, -2), router.weight))
        ranked = scores.topk(self.chosen + 1, -1).values
        self.margins.append(float((ranked[:, -2] - ranked[:, -1]).min()))


@pytest.mark.parametrize("kind", sorted(architectures.SEEDS))
def test_scores_of_mixtures_are_not_equal_by_luck(made, kind):
    """No token of the prompts above is nearly tied between experts; and which expert it is matters."""
    model, directory = made(kind)
    bundle, reference = Bundle.load(directory), Reference(model, architectures.sites(kind))
    routers = Routers(reference.model)
    prompts = [*world.prompts(32, seed=PROMPTS, longest=250), *map(list, bundle.card.self_test.prompts)]
    expected = bundle.logits(np.stack([reference.features(prompt) for prompt in prompts]))
    assert min(routers.margins) > 1.5e-4
    for layer in reference.model.model.layers[1:]:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.flip(0)
    others = bundle.logits(np.stack([reference.features(prompt) for prompt in prompts]))
    assert np.median(np.abs(others - expected)) > 0.1


def test_a_tie_between_experts_moves_a_score_far_beyond_rounding(made):
    """Two experts with one router row but for a millionth: which of them is taken decides over the score."""
    model, directory = made("mixtral")
    bundle, prompts = Bundle.load(directory), world.prompts(8, seed=PROMPTS, longest=60)
    scores = []
    for nudge in (1 + 1e-6, 1 - 1e-6):
        reference = Reference(model, architectures.ATTENTION_SITES)
        for layer in reference.model.model.layers:
            rows = layer.mlp.gate.weight.data
            rows[1] = rows[0] * nudge
        scores.append(bundle.logits(np.stack([reference.features(prompt) for prompt in prompts])))
    assert np.abs(scores[0] - scores[1]).max() > 0.1
