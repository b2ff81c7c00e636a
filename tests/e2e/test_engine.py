"""The guarded engine in this process: scores, actions and identity on a tiny random model."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from guard.engine import selftest
from guard.engine.config import AUDIENCE_ENV, KEY_FILE_ENV
from guard.verdict import Decision, Directive, Rule
from tests.e2e import child
from tests.e2e.inprocess import answer, ask, guarded, sampling, scheduler, shut_down
from tests.engine import world

REFUSE = Decision(policy="test", rules=(Rule(above=0.5, action="refuse"),))
OBSERVE = REFUSE.model_copy(update={"mode": "observe"})
CHECK = REFUSE.model_copy(update={"mode": "check"})
PASS = Decision(policy="test", rules=())
ESCALATE = Decision(policy="test", rules=(Rule(above=0.5, action="escalate"),))


@pytest.fixture(scope="module")
def unready(tiny_model, tiny_bundle_dir, key_file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_FILE_ENV, str(key_file))
        patch.setenv(AUDIENCE_ENV, "engine")
        llm = guarded(tiny_model, tiny_bundle_dir)
        yield llm
        shut_down(llm)


@pytest.fixture(scope="module")
def turned_away(unready):
    """What a request gets before the self-test."""
    return ask(unready, world.prompts(3), sampling())


@pytest.fixture(scope="module")
def llm(unready, turned_away, tiny_bundle):
    selftest.run(unready, tiny_bundle.card.self_test.prompts)
    return unready


@pytest.fixture(scope="module")
def seal(keys):
    def make(decision: Decision) -> str:
        return Directive.issue(decision, audience="engine", body=b"").seal(keys)

    return make


@pytest.fixture(scope="module")
def expected(reference, tiny_bundle):
    """Logit of a prompt by transformers."""

    def logit(prompt: list[int]) -> float:
        return float(tiny_bundle.logits(reference.features(prompt)[None])[0])

    return logit


@contextmanager
def called_functions(package: str):
    """Names of the package's functions that run in this thread meanwhile."""
    called: set[str] = set()

    def note(frame, event, _):
        if event == "call" and frame.f_globals.get("__name__", "").startswith(f"{package}."):
            called.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(None)


def clear_of_the_threshold(prompts, expected, margin=0.01):
    """Prompts whose action does not hang on rounding."""
    return [p for p in prompts if abs(expected(p)) > margin]


def test_before_the_self_test_every_request_is_turned_away(turned_away):
    assert [(a.finish_reason, a.tokens, a.verdict.reason) for a in turned_away] == [
        ("error", [], "not_ready")
    ] * 3


def test_logits_equal_transformers_on_real_prompts(llm, reference, tiny_bundle, everyday, seal):
    """Whole and chunked (longer than 96 tokens), uncached in the first round and cached in the second."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference.model.name_or_path)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)[
            "input_ids"
        ]
        for text in everyday
    ]
    prompts += [prompts[0][:-1] + p for p in prompts[:30]]  # shared prefixes
    assert len(prompts) >= 200
    assert sum(len(p) > 96 for p in prompts) >= 10
    expected = tiny_bundle.logits(np.stack([reference.features(p) for p in prompts]))
    params = sampling(seal(CHECK))
    cached = []
    for _ in range(2):
        answers = ask(llm, prompts, params)
        measured = np.array([a.verdict.logit for a in answers])
        assert np.abs(measured - expected).max() <= 1e-3
        assert all(a.tokens == [] for a in answers)
        cached.append(sum(a.cached > 0 for a in answers))
    assert cached[1] > 0


def test_passed_requests_answer_as_plain_vllm_does(llm, tiny_model, tmp_path, seal):
    prompts = world.prompts(200, seed=5, longest=250)
    plain = child.run(tmp_path, tiny_model, prompts)
    scheduler(llm).reset_prefix_cache()
    params = sampling(seal(OBSERVE), max_tokens=16, ignore_eos=True)
    for expected in plain.tokens:
        answers = ask(llm, prompts, params)
        assert [a.tokens for a in answers] == expected
        assert {a.verdict.decision for a in answers} == {"pass", "refuse"}


def test_mixed_actions_in_one_batch_each_get_their_own(llm, expected, seal):
    prompts = clear_of_the_threshold(world.prompts(96, seed=11), expected)
    decisions = [(REFUSE, OBSERVE, CHECK, PASS, ESCALATE)[i % 5] for i in range(len(prompts))]
    alone = ask(llm, prompts, sampling(seal(PASS)))
    params = [sampling(seal(decision)) for decision in decisions]
    answers = ask(llm, prompts, params)
    for prompt, decision, solo, got in zip(prompts, decisions, alone, answers, strict=True):
        logit = expected(prompt)
        assert got.verdict.logit == pytest.approx(logit, abs=1e-3)
        assert got.verdict.mode == decision.mode
        if decision is CHECK:
            assert (got.verdict.action, got.tokens) == ("checked", [])
        elif decision in (REFUSE, ESCALATE) and logit > 0:
            action = decision.rules[0].action
            assert (got.verdict.action, got.tokens, got.finish_reason) == (action, [], "stop")
        else:
            assert (got.verdict.action, got.tokens) == ("pass", solo.tokens)


def test_preemption_before_and_after_the_verdict(llm, expected, seal, monkeypatch):
    engine = scheduler(llm)
    engine.reset_prefix_cache()
    judged, original = [], engine._preempt_request

    def preempt(request, *args, **kwargs):
        judged.append(request.request_id not in engine.ledger.unjudged)
        return original(request, *args, **kwargs)

    monkeypatch.setattr(engine, "_preempt_request", preempt)
    prompts = clear_of_the_threshold(world.prompts(60, seed=21, shortest=100, longest=300), expected)
    params = sampling(seal(REFUSE), max_tokens=150, ignore_eos=True)
    answers = ask(llm, prompts, params)
    assert set(judged) == {True, False}, "the pool must be small enough for both kinds of preemption"
    for prompt, got in zip(prompts, answers, strict=True):
        logit = expected(prompt)
        assert got.verdict.logit == pytest.approx(logit, abs=1e-3)
        assert len(got.tokens) == (0 if logit > 0 else 150)
    assert len(engine.ledger) == 0
    assert engine.kv_cache_manager.block_pool.get_num_free_blocks() == 39  # all but the null block


@pytest.fixture(scope="module")
def unsafe(expected):
    return next(p for p in world.prompts(50, seed=31, shortest=20) if len(p) > 20 and expected(p) > 0.3)


@pytest.fixture(scope="module")
def safe(expected):
    return next(p for p in world.prompts(50, seed=31, shortest=20) if len(p) > 20 and expected(p) < -0.3)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 3, "temperature": 0.7},
        {"logprobs": 3},
        {"prompt_logprobs": 2},
        {"logprobs": 2, "prompt_logprobs": 0},
        {"stop": ["guard:refused", "a"]},
        {"ignore_eos": True, "min_tokens": 5},
        {"max_tokens": 1},
        {"structured_outputs": ["yes", "no"]},
        {"logit_bias": {65: 100.0}},
    ],
    ids="+".join,
)
def test_sampling_options_change_nothing_about_a_refusal(llm, unsafe, safe, seal, options):
    if "structured_outputs" in options:
        from vllm.sampling_params import StructuredOutputsParams

        options = {"structured_outputs": StructuredOutputsParams(choice=["yes", "no"])}
    params = sampling(seal(REFUSE), **options)
    refused, passed = ask(llm, [unsafe, safe], params)
    assert refused.verdict.action == "refuse"
    assert [list(c.token_ids) for c in refused.output.outputs] == [[]] * params.n
    assert all(c.text == "" and c.stop_reason == "guard:refused" for c in refused.output.outputs)
    assert refused.output.prompt_logprobs in (None, [], [None])
    # A stop string is found by the front end, and vLLM then aborts in the engine: no last output, no verdict.
    assert passed.verdict is None or passed.verdict.action == "pass"
    assert all(len(c.token_ids) > 0 for c in passed.output.outputs)
    assert len(scheduler(llm).ledger) == 0


def test_structured_output_still_holds_for_passed_requests(llm, safe, seal):
    from vllm.sampling_params import StructuredOutputsParams

    params = sampling(seal(REFUSE), structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    assert ask(llm, [safe], params)[0].text in ("yes", "no")


def test_default_policy_refuses_requests_without_a_directive(llm, unsafe, safe):
    refused, passed = ask(llm, [unsafe, safe], sampling())
    assert (refused.verdict.action, refused.verdict.policy) == ("refuse", "engine-default")
    assert passed.verdict.action == "pass"


def test_benchmark_switch_leaves_nothing_of_the_guard_and_puts_it_back(llm, unsafe):
    """What ``make bench`` times as plain must be plain."""
    from loadtests.switch import Switch

    switch = Switch(llm)
    switch.off()
    try:
        with called_functions("guard") as called:
            (plain,) = ask(llm, [unsafe], sampling())
        assert (plain.verdict, len(plain.tokens), called) == (None, 12, set())
    finally:
        switch.on()
    with called_functions("guard") as called:
        (refused,) = ask(llm, [unsafe], sampling())
    assert (refused.verdict.action, refused.tokens) == ("refuse", [])
    assert {"stage", "score", "read", "update_from_output"} <= called


def test_forged_directive_is_an_error_for_a_harmless_prompt_too(llm, safe, keys):
    from guard.sealed import Keyring

    forged = Directive.issue(PASS, audience="engine", body=b"").seal(Keyring.generate())
    (got,) = ask(llm, [safe], sampling(forged))
    assert (got.finish_reason, got.tokens, got.verdict.reason) == ("error", [], "directive_bad_mac")


def test_aborted_request_leaves_nothing_behind(llm, safe, seal):
    engine = llm.llm_engine
    for steps in (0, 1, 3):
        engine.add_request("gone", {"prompt_token_ids": safe}, sampling(seal(PASS), max_tokens=50))
        for _ in range(steps):
            engine.step()
        engine.abort_request(["gone"])
        while engine.has_unfinished_requests():
            engine.step()
        assert len(scheduler(llm).ledger) == 0


def test_session_that_streams_its_input_is_turned_away(llm, safe, seal):
    """Its later turns would extend a prompt that has been judged already."""
    engine = llm.llm_engine
    request = engine.input_processor.process_inputs(
        "session",
        {"prompt_token_ids": safe},
        sampling(seal(PASS)),
        supported_tasks=engine.get_supported_tasks(),
        resumable=True,
    )
    engine.add_request("session", request, request.params)
    outputs = [output for _ in range(10) for output in engine.step()]
    engine.abort_request(["session"])  # the front end keeps sessions until they are closed
    got = answer(outputs[-1])
    assert (got.finish_reason, got.tokens, got.verdict.reason) == ("error", [], "streaming_input")
    assert len(scheduler(llm).ledger) == 0


def test_kinds_of_request_that_are_never_answered(llm, safe):
    """They cannot reach this engine as it was started; the scheduler does not rely on that."""
    from vllm import PoolingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

    from guard.engine.scheduler import denial

    def reason(prompt=safe, params=None, pooling=None, adapters=None, **more):
        return denial(Request("r", prompt, params, pooling, **more), adapters or {})

    params, adapter = sampling(), LoRARequest("one", 1, "/adapters/one")
    assert reason(params=params) is None
    assert reason(pooling=PoolingParams(task="embed")) == "pooling_request"
    assert reason(params=params, resumable=True) == "streaming_input"
    assert reason(params=params, prompt_embeds=torch.zeros(len(safe), 128)) == "prompt_embeddings"
    assert reason(params=params, lora_request=adapter) == "lora_not_listed"
    assert reason(params=params, lora_request=adapter, adapters={"one": "/adapters/two"}) == "lora_not_listed"
    assert reason(params=params, lora_request=adapter, adapters={"one": "/adapters/one"}) is None


def test_missing_score_fails_closed(llm, safe, seal, monkeypatch):
    """A worker that loses a score, by fault or by design, must not get its token out."""
    monkeypatch.setattr(taps(llm), "score", lambda: None)
    (got,) = ask(llm, [safe], sampling(seal(PASS)))
    assert (got.finish_reason, got.tokens, got.verdict.reason) == ("error", [], "no_score")


def test_batch_that_was_not_staged_fails_closed(llm, safe, seal, monkeypatch):
    monkeypatch.setattr(taps(llm).staging, "stage", lambda layout: 0)
    (got,) = ask(llm, [safe], sampling(seal(PASS)))
    assert (got.finish_reason, got.tokens, got.verdict.reason) == ("error", [], "no_score")


def test_tap_that_did_not_fire_fails_closed(llm, safe, seal):
    """One site of three is not read; the others are, in this step and in the steps before it."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    hooks = model.model.layers[1].mlp.down_proj._forward_pre_hooks
    kept = dict(hooks)
    hooks.clear()
    (got,) = ask(llm, [safe], sampling(seal(PASS)))
    hooks.update(kept)
    assert (got.finish_reason, got.tokens, got.verdict.reason) == ("error", [], "score_not_finite")
    assert ask(llm, [safe], sampling(seal(PASS)))[0].verdict.action == "pass"


def taps(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.taps
