"""The same reading, verdicts and answers in every mode of the engine, compared with plain vLLM.

Every test runs plain vLLM and the guarded engine in the same mode, each in a process of its own, on prompts
that are read whole and in chunks (longer than 96 tokens), without and with cached prefixes, many in a batch.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from guard.bundle import Bundle
from guard.capture import read_prompts
from guard.checkpoint import Checkpoint
from guard.pooling import Pooling
from guard.scorer import Scorer
from loadtests.random_model import with_sequence_probe
from tests.e2e import child
from tests.e2e.patched_world import NEW_TOKENS, answers, made, shown
from tests.engine import architectures, world


@pytest.fixture(scope="module")
def prompts():
    return world.prompts(60, seed=71, longest=250)


@pytest.fixture(scope="module")
def patched_bundle(tiny_bundle, tmp_path_factory):
    bundle = tiny_bundle
    for patch in made(bundle.card.model.shape):
        bundle = bundle.with_patch(patch)
    return bundle, bundle.save(tmp_path_factory.mktemp("patched") / "bundle")


@pytest.fixture(scope="module")
def stored_bundle(tiny_bundle, tmp_path_factory):
    """Without patches from a donor, which need an eager engine."""
    bundle = tiny_bundle
    for patch in made(bundle.card.model.shape):
        if patch.card.kind != "dynamic":
            bundle = bundle.with_patch(patch)
    return bundle, bundle.save(tmp_path_factory.mktemp("stored") / "bundle")


@pytest.fixture(scope="module")
def sequence(tiny_bundle, reference, prompts, tmp_path_factory):
    """A bundle whose probe reads every token, and its logits by transformers ``[prompts]``."""
    pooling = Pooling(kind="attention", heads=2)
    bundle = with_sequence_probe(tiny_bundle, reference, pooling, world.prompts(60, seed=1000))
    expected = [bundle.sequence.logit(reference.features_of_all(prompt)) for prompt in prompts]
    return bundle.save(tmp_path_factory.mktemp("sequence") / "bundle"), np.array(expected)


@pytest.fixture(scope="module")
def expected(prompts, reference, tiny_bundle):
    """Logits by transformers ``[prompts]``."""
    return tiny_bundle.logits(np.stack([reference.features(prompt) for prompt in prompts]))


def assert_guarded(result, plain, expected):
    """Right scores, right verdicts, no token of a refused prompt, plain vLLM's tokens of all others."""
    assert sum(map(bool, result.cached[1])) >= 15
    for turn, logits in enumerate(result.logits):
        assert np.abs(np.array(logits) - expected).max() <= 1e-3
        for prompt, logit in enumerate(expected):
            tokens, action = result.tokens[turn][prompt], result.actions[turn][prompt]
            if abs(logit) > 0.01:
                assert action == ("refuse" if logit > 0 else "pass")
            assert tokens == ([] if action == "refuse" else plain.tokens[turn][prompt])


def assert_untouched(result, plain):
    """Watched but never refused: all tokens are plain vLLM's."""
    assert {action for actions in result.actions for action in actions} == {"pass"}
    assert result.tokens == plain.tokens


class TestCompiled:
    """torch.compile, with one cache of compiled artifacts for all starts, plain vLLM's the first."""

    @pytest.fixture(scope="class")
    def options(self):
        return {"enforce_eager": False}

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        return tmp_path_factory.mktemp("compiled")

    @pytest.fixture(scope="class")
    def start(self, folder, tiny_model, prompts, options):
        environment = {"VLLM_CACHE_ROOT": str(folder / "cache")}

        def run(name, **more):
            return child.run(
                folder, tiny_model, prompts, name=name, options=options, environment=environment, **more
            )

        return run

    @pytest.fixture(scope="class")
    def plain(self, start):
        return start("plain")

    def test_scores_and_answers_are_right(self, start, plain, tiny_bundle_dir, expected):
        result = start("guarded", bundle=tiny_bundle_dir)
        assert_guarded(result, plain, expected)
        assert result.facts["calls"] == 0, "the taps are in the compiled code, not in Python"

    def test_artifacts_of_an_earlier_start_read_as_well(self, start, plain, tiny_bundle_dir, expected):
        again = start("again", bundle=tiny_bundle_dir, mode="observe")
        assert_untouched(again, plain)
        assert np.abs(np.array(again.logits) - expected).max() <= 1e-3

    def test_every_token_is_scored_by_a_sequence_probe(self, start, plain, sequence):
        directory, expected = sequence
        result = start("sequence", bundle=directory)
        assert_guarded(result, plain, expected)

    def test_stored_patches_answer_as_their_reference(
        self, folder, tiny_model, reference, stored_bundle, prompts, options
    ):
        bundle, directory = stored_bundle
        few = prompts[:20]
        expected = answers(reference.model, bundle.patches["factors"], [tuple(p) for p in few])
        result = child.run(
            folder, tiny_model, few, name="patched", bundle=directory, patch="factors", options=options,
            max_tokens=NEW_TOKENS, environment={"VLLM_CACHE_ROOT": str(folder / "cache")},
        )  # fmt: skip
        assert [[shown(tokens) for tokens in turn] for turn in result.tokens] == [expected] * 2


class TestSpeculative:
    """Drafts by n-gram lookup: a prompt's final token may be followed by draft tokens in the same step."""

    @pytest.fixture(scope="class")
    def repetitive(self):
        """Prompts that repeat themselves, so that there is something to look up."""
        return [(prompt[:7] * 40)[: len(prompt)] for prompt in world.prompts(60, seed=73, longest=250)]

    def test_scores_and_answers_are_right(
        self, tmp_path, tiny_model, tiny_bundle, tiny_bundle_dir, repetitive, reference
    ):
        expected = tiny_bundle.logits(np.stack([reference.features(p) for p in repetitive]))
        lookup = {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
        options = {"speculative_config": lookup}
        plain = child.run(tmp_path, tiny_model, repetitive, name="plain", options=options, max_tokens=40)
        result = child.run(
            tmp_path, tiny_model, repetitive, bundle=tiny_bundle_dir, options=options, max_tokens=40
        )
        assert_guarded(result, plain, expected)
        assert result.facts["vllm:spec_decode_num_accepted_tokens"] >= 20


class TestHiddenLayer:
    """A probe with one hidden layer in place of a linear one."""

    @pytest.fixture(scope="class")
    def bundle(self, tiny_bundle, prompts, reference):
        card, rng = tiny_bundle.card, np.random.default_rng(3)
        features = np.stack([reference.features(prompt) for prompt in prompts])
        weight = rng.standard_normal((8, card.features)) / (features.std(0) * card.features**0.5)
        raw = Scorer(
            weight=weight.astype(np.float32),
            bias=-(features @ weight.T).mean(0).astype(np.float32),
            readout=rng.standard_normal(8).astype(np.float32),
        )
        scorer = replace(raw, readout_bias=float(-np.median(raw.logits(features))))
        asked = np.stack([reference.features(list(prompt)) for prompt in card.self_test.prompts])
        known = card.self_test.model_copy(
            update={"logits": {"float32": tuple(scorer.logits(asked).tolist())}}
        )
        return Bundle(
            card.model_copy(update={"probe": "mlp", "self_test": known}), scorer, tiny_bundle.patches.values()
        )

    def test_scores_and_answers_are_right(self, tmp_path, tiny_model, bundle, prompts, reference):
        features = np.stack([reference.features(prompt) for prompt in prompts])
        expected = bundle.logits(features)
        linear = features @ bundle.scorer.weight.T @ bundle.scorer.readout
        assert abs(np.corrcoef(expected, linear)[0, 1]) < 0.95, "the layer between them matters"
        plain = child.run(tmp_path, tiny_model, prompts, name="plain")
        result = child.run(tmp_path, tiny_model, prompts, bundle=bundle.save(tmp_path / "bundle"))
        assert_guarded(result, plain, expected)


class TestTensorParallel:
    """Two ranks, each with half of every input: the probe's first layer is summed over both."""

    @pytest.mark.parametrize("name", ["mean", "donor-some"])
    def test_patches_answer_as_their_reference(
        self, tmp_path, tiny_model, reference, patched_bundle, prompts, name
    ):
        bundle, directory = patched_bundle
        few = prompts[:20]
        expected = answers(reference.model, bundle.patches[name], [tuple(p) for p in few])
        options, environment = {"tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
        result = child.run(
            tmp_path, tiny_model, few, bundle=directory, patch=name, options=options,
            max_tokens=NEW_TOKENS, environment=environment,
        )  # fmt: skip
        assert [[shown(tokens) for tokens in turn] for turn in result.tokens] == [expected] * 2

    def test_scores_and_answers_are_right(self, tmp_path, tiny_model, tiny_bundle_dir, prompts, expected):
        options, environment = {"tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
        plain = child.run(
            tmp_path, tiny_model, prompts, name="plain", options=options, environment=environment
        )
        result = child.run(
            tmp_path,
            tiny_model,
            prompts,
            bundle=tiny_bundle_dir,
            options=options,
            environment=environment,
        )
        assert_guarded(result, plain, expected)

    def test_every_token_is_scored_by_a_sequence_probe(self, tmp_path, tiny_model, sequence, prompts):
        directory, expected = sequence
        result = child.run(
            tmp_path,
            tiny_model,
            prompts,
            bundle=directory,
            options={"tensor_parallel_size": 2},
            environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        )
        assert np.abs(np.array(result.logits) - expected).max() <= 1e-3

    def test_shared_experts_are_split_as_well(self, tmp_path):
        """A mixture of experts: one site is the input of its shared expert, two are heads."""
        model = architectures.make_model(tmp_path / "model", "qwen2_moe")
        bundle = architectures.make_bundle(tmp_path / "bundle", model, "qwen2_moe")
        prompts = world.prompts(32, seed=61, longest=250)  # the architecture's seed is chosen for these
        offline = Checkpoint.open(model).load_model()
        expected = bundle.logits(read_prompts(offline, architectures.sites("qwen2_moe"), prompts))
        result = child.run(
            tmp_path,
            model,
            prompts,
            bundle=tmp_path / "bundle",
            options={"tensor_parallel_size": 2},
            environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        )
        assert np.abs(np.array(result.logits) - expected).max() <= 1e-3
