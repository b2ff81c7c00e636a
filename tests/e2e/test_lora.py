"""LoRA: adapters that the bundle lists are read, judged and answered; any other is not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from guard.adapters import Adapter
from guard.bundle import Bundle
from guard.capture import read_prompts
from guard.cli import main
from guard.engine import selftest
from guard.engine.config import verify_adapters
from guard.engine.errors import GuardStartupError
from guard.engine.support import refuse_too_few_slots
from guard.merge import merge
from tests.e2e.inprocess import ENGINE, answer, ask, guarded, sampling, scheduler, shut_down
from tests.engine import world
from tests.guard import worlds

LORA = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 16}
TARGETS = ("q_proj", "o_proj", "gate_proj", "down_proj")
NAMES = ("one", "two")


@pytest.fixture(scope="module")
def base(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def adapters(tiny_model, base, tmp_path_factory):
    """Directories by name; the last is in no bundle."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: worlds.adapter(root / name, base, TARGETS, size=0.25, seed=seed)
        for seed, name in enumerate((*NAMES, "stranger"))
    }


@pytest.fixture(scope="module")
def bundle_dir(tiny_model, tiny_bundle_dir, adapters, tmp_path_factory):
    target = tmp_path_factory.mktemp("listed") / "bundle"
    named = [part for name in NAMES for part in ("--adapter", f"{name}={adapters[name]}")]
    arguments = ["bundle", "adapter", str(tiny_bundle_dir), "--model", str(tiny_model), "--out", str(target)]
    main([*arguments, *named], standalone_mode=False)
    return target


@pytest.fixture(scope="module")
def prompts():
    return world.prompts(30, seed=81, longest=250)


@pytest.fixture(scope="module")
def expected(tiny_model, base, adapters, bundle_dir, prompts):
    """Logits by transformers with the adapter merged into the weights, by name; None is the model itself."""
    bundle, found = Bundle.load(bundle_dir), {}
    for name in (None, *NAMES):
        model = copy.deepcopy(base)
        if name:
            merge(model, Adapter.open(adapters[name], name))
        found[name] = bundle.logits(read_prompts(model, world.SITES, prompts))
    return found


@pytest.fixture(scope="module")
def requests(adapters):
    from vllm.lora.request import LoRARequest

    return {name: LoRARequest(name, i, str(path)) for i, (name, path) in enumerate(adapters.items(), start=1)}


@pytest.fixture(scope="module")
def unready(tiny_model, bundle_dir, adapters):
    served = {name: str(adapters[name]) for name in NAMES}
    llm = guarded(tiny_model, bundle_dir, adapters=served, **LORA)
    yield llm
    shut_down(llm)


@pytest.fixture(scope="module")
def half_tested(unready, tiny_bundle, prompts):
    """What a request gets when only the model itself has passed its self-test."""
    selftest.run(unready, tiny_bundle.card.self_test.prompts)
    return ask(unready, prompts[:1], sampling())[0]


@pytest.fixture(scope="module")
def llm(unready, half_tested, tiny_bundle, requests):
    selftest.run(unready, tiny_bundle.card.self_test.prompts, [requests[name] for name in NAMES])
    return unready


def run(llm, prompts, adapters, params):
    """One batch; ``adapters`` holds a LoRARequest or None for each prompt."""
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False, lora_request=adapters
    )
    return [answer(output) for output in outputs]


def test_nobody_is_answered_until_every_adapter_has_matched(half_tested, llm, prompts):
    assert (half_tested.finish_reason, half_tested.verdict.reason) == ("error", "not_ready")
    assert ask(llm, prompts[:1], sampling())[0].verdict.action in ("pass", "refuse")


def test_adapters_change_scores_enough_to_tell_them_apart(expected):
    for one, other in ((None, "one"), (None, "two"), ("one", "two")):
        assert np.abs(expected[one] - expected[other]).min() > 1e-3
        assert np.abs(expected[one] - expected[other]).max() > 0.3


def test_each_request_is_read_under_its_own_adapter_in_a_mixed_batch(llm, prompts, requests, expected):
    mixed = [(None, *NAMES)[i % 3] for i in range(len(prompts))]
    logits = np.array([expected[name][i] for i, name in enumerate(mixed)])
    for _ in range(2):  # the second time with cached prefixes, which adapters do not share
        answers = run(llm, prompts, [requests.get(name) for name in mixed], sampling(ignore_eos=True))
        assert np.abs(np.array([got.verdict.logit for got in answers]) - logits).max() <= 1e-3
        for got, logit in zip(answers, logits, strict=True):
            if abs(logit) > 0.01:
                action = ("refuse", 0) if logit > 0 else ("pass", 12)
                assert (got.verdict.action, len(got.tokens)) == action
    assert len(scheduler(llm).ledger) == 0


def test_adapter_that_is_not_listed_is_an_error(llm, prompts, requests):
    (got,) = run(llm, prompts[:1], [requests["stranger"]], sampling())
    assert (got.finish_reason, got.tokens, got.verdict.reason) == ("error", [], "lora_not_listed")


def test_listed_name_with_another_directory_is_an_error(llm, prompts, adapters):
    from vllm.lora.request import LoRARequest

    (got,) = run(llm, prompts[:1], [LoRARequest("one", 9, str(adapters["stranger"]))], sampling())
    assert (got.finish_reason, got.tokens, got.verdict.reason) == ("error", [], "lora_not_listed")


def test_adapters_to_serve_are_checked_against_the_bundle(bundle_dir, adapters):
    bundle = Bundle.load(bundle_dir)
    verify_adapters(bundle, {"one": str(adapters["one"])})
    for served, sentence in (
        ({"stranger": adapters["stranger"]}, "not listed in the bundle"),
        ({"one": adapters["two"]}, "not the one that the bundle lists"),
        ({"one": "/nowhere"}, "holds no adapter_config.json"),
    ):
        with pytest.raises(GuardStartupError, match=sentence):
            verify_adapters(bundle, {name: str(path) for name, path in served.items()})


def test_too_few_slots_on_a_cpu_are_refused(tiny_model):
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=str(tiny_model), **{**ENGINE, **LORA, "max_loras": 2}).create_engine_config()
    refuse_too_few_slots(config, 1)
    with pytest.raises(GuardStartupError, match="need --max-loras 3"):
        refuse_too_few_slots(config, 2)
