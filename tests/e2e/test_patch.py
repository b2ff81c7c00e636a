"""Patched answers of the engine against their reference in transformers, side by side in one engine."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from guard import patch as patches
from guard.bundle import Bundle
from guard.cli import main
from guard.engine import selftest
from guard.engine.config import AUDIENCE_ENV, KEY_FILE_ENV
from guard.locate.decoding import greedy
from guard.locate.twins import folded_twins
from guard.verdict import Decision, Directive, Rule
from loadtests import random_model
from tests.e2e import child
from tests.e2e.inprocess import ask, guarded, sampling, scheduler, shut_down
from tests.e2e.patched_world import NEW_TOKENS, PREFIX, answers, donor_of, made, shown
from tests.engine import world


@pytest.fixture(scope="module")
def bundle(tiny_bundle, tmp_path_factory) -> tuple[Bundle, object]:
    bundle = tiny_bundle
    for patch in made(tiny_bundle.card.model.shape):
        bundle = bundle.with_patch(patch)
    return bundle, bundle.save(tmp_path_factory.mktemp("patched") / "bundle")


@pytest.fixture(scope="module")
def llm(tiny_model, bundle, key_file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_FILE_ENV, str(key_file))
        patch.setenv(AUDIENCE_ENV, "engine")
        llm = guarded(tiny_model, bundle[1])
        selftest.run(llm, bundle[0].card.self_test.prompts)
        yield llm
        shut_down(llm)


@pytest.fixture(scope="module")
def seal(keys):
    def make(name: str | None, above: float = 0.0, **options) -> str:
        rules = (Rule(above=above, action="patch", patch=name, **options),) if name else ()
        decision = Decision(policy="test", rules=rules)
        return Directive.issue(decision, audience="engine", body=b"").seal(keys)

    return make


PROMPTS = world.prompts(12, seed=3)


@pytest.fixture(scope="module")
def expected(reference, bundle):
    """Greedy answers in transformers, by name of the patch."""
    model = reference.model
    prompts = [tuple(p) for p in PROMPTS]
    found = {None: answers(model, None, prompts)}
    for name, patch in bundle[0].patches.items():
        found[name] = answers(model, patch, prompts)
    donor = donor_of(model, bundle[0].patches["donor-all"])
    found["the donor"] = greedy(donor, prompts, new_tokens=NEW_TOKENS)
    return found


def run(llm, seal, names, **options):
    """Each prompt under each name, all in one batch of requests."""
    order = [(name, i) for i in range(len(PROMPTS)) for name in names]
    params = [
        sampling(seal(name, still_unsafe="pass") if name else seal(None), max_tokens=NEW_TOKENS, **options)
        for name, _ in order
    ]
    return dict(zip(order, ask(llm, [PROMPTS[i] for _, i in order], params), strict=True))


NAMES = (None, "zero", "mean", "factors", "steer", "donor-some", "donor-all", "words")


def test_every_patch_answers_as_its_reference_beside_all_others(llm, seal, expected):
    """Three rounds over a warm prefix cache: no block of one is ever used by another."""
    for _ in range(3):
        for (name, i), got in run(llm, seal, NAMES).items():
            assert shown(got.tokens) == expected[name][i], (name, i)
            assert (got.verdict.action, got.verdict.patch) == ("patch" if name else "pass", name)


def test_every_neuron_from_the_donor_is_the_donor(expected):
    assert expected["donor-all"] == expected["the donor"]
    assert expected["the donor"] != expected[None]


def test_the_patched_prompt_is_scored_again(llm, seal, bundle, reference):
    """By a probe that reads below the patched layer, and what was made of it above."""
    patch = bundle[0].patches["factors"]
    before = bundle[0].logits(np.stack([reference.features(p) for p in PROMPTS]))
    with patches.applied(patch, reference.model):
        after = bundle[0].logits(np.stack([reference.features(p) for p in PROMPTS]))
    probability = bundle[0].card.calibration.probability
    for (_, i), got in run(llm, seal, ["factors"]).items():
        assert got.verdict.logit == pytest.approx(before[i], abs=1e-3)
        assert got.verdict.patched_probability == pytest.approx(probability(float(after[i])), abs=1e-3)
    assert np.abs(before - after).max() > 0.1


def test_a_request_that_is_still_unsafe_is_refused_unless_the_policy_says_pass(llm, seal, bundle, expected):
    above = 0.5
    asked = {"refuse": sampling(seal("factors", above), max_tokens=NEW_TOKENS)}
    asked["pass"] = sampling(seal("factors", above, still_unsafe="pass"), max_tokens=NEW_TOKENS)
    seen = set()
    for still_unsafe, params in asked.items():
        for i, got in enumerate(ask(llm, PROMPTS, params)):
            verdict = got.verdict
            if verdict.probability < above:
                assert (verdict.action, verdict.patch, shown(got.tokens)) == ("pass", None, expected[None][i])
            elif verdict.patched_probability >= above and still_unsafe == "refuse":
                assert (verdict.action, verdict.patch, got.tokens) == ("refuse", "factors", [])
            else:
                assert (verdict.action, verdict.patch) == ("patch", "factors")
                assert shown(got.tokens) == expected["factors"][i]
            seen.add((still_unsafe, verdict.action))
    assert seen >= {("refuse", "refuse"), ("refuse", "pass"), ("pass", "patch"), ("pass", "pass")}


def test_preempted_patched_requests_stay_patched(llm, seal, expected, monkeypatch):
    """In a pool that is too small: some are preempted before the flag, some between the runs, some after."""
    engine = scheduler(llm)
    engine.reset_prefix_cache()
    seen, original, schedule = set(), engine._preempt_request, engine.schedule

    def state(request):
        return request.request_id in engine.ledger.slots, request.request_id in engine.ledger.unjudged

    def preempt(request, *args, **kwargs):
        if not kwargs.get("drop_stale_output"):
            seen.add(state(request))
        return original(request, *args, **kwargs)

    def one_between_the_runs(*args, **kwargs):
        between = [r for r in engine.running if state(r) == (True, True) and r.num_computed_tokens > 0]
        if between and (True, True) not in seen:  # too rare to wait for
            engine.running.remove(between[0])
            engine._preempt_request(between[0], 0.0)
        return schedule(*args, **kwargs)

    monkeypatch.setattr(engine, "_preempt_request", preempt)
    monkeypatch.setattr(engine, "schedule", one_between_the_runs)
    prompts = world.prompts(24, seed=33, shortest=100, longest=250)
    names = ["zero", "donor-some", None]
    order = [names[i % 3] for i in range(len(prompts))]
    params = [
        sampling(seal(name, still_unsafe="pass") if name else seal(None), max_tokens=120, ignore_eos=True)
        for name in order
    ]
    together = ask(llm, prompts, params)
    assert seen >= {(True, True), (True, False), (False, False)}
    monkeypatch.undo()
    engine.reset_prefix_cache()
    alone = [ask(llm, [prompt], one)[0] for prompt, one in zip(prompts[:9], params, strict=False)]
    assert [got.tokens for got in together[:9]] == [got.tokens for got in alone]
    assert len(engine.ledger) == 0
    assert engine.kv_cache_manager.block_pool.get_num_free_blocks() == 39  # all but the null block


def test_a_later_turn_is_scored_afresh_and_answered_as_by_a_fresh_engine(llm, seal, expected):
    (first,) = ask(
        llm, [PROMPTS[0]], sampling(seal("zero", still_unsafe="pass"), max_tokens=40, ignore_eos=True)
    )
    turn = PROMPTS[0] + first.tokens + PROMPTS[1]
    warm = ask(llm, [turn], sampling(seal(None)))[0]
    scheduler(llm).reset_prefix_cache()
    fresh = ask(llm, [turn], sampling(seal(None)))[0]
    assert warm.tokens == fresh.tokens
    assert warm.verdict.logit == pytest.approx(fresh.verdict.logit, abs=1e-4)


def test_observing_and_checking_patch_nothing(llm, keys, expected):
    rule = Rule(above=0.0, action="patch", patch="zero")
    for mode, tokens in (("observe", expected[None][0]), ("check", ())):
        decision = Decision(policy="test", mode=mode, rules=(rule,))
        directive = Directive.issue(decision, audience="engine", body=b"").seal(keys)
        (got,) = ask(llm, [PROMPTS[0]], sampling(directive, max_tokens=NEW_TOKENS))
        assert shown(got.tokens) == tokens
        assert (got.verdict.decision, got.verdict.patch, got.verdict.patched_probability) == (
            "patch",
            "zero",
            None,
        )


def test_an_unknown_patch_is_an_error_and_no_answer(llm, seal):
    (got,) = ask(llm, [PROMPTS[0]], sampling(seal("other")))
    assert (got.finish_reason, got.tokens, got.verdict.reason) == ("error", [], "directive_unknown_patch")


@pytest.mark.parametrize("longest", [2, len(PREFIX), NEW_TOKENS])
def test_a_prefix_ends_where_the_answer_must(llm, seal, expected, longest):
    (got,) = ask(llm, [PROMPTS[0]], sampling(seal("words"), max_tokens=longest, logprobs=1))
    assert tuple(got.tokens) == expected["words"][0][:longest]
    assert got.finish_reason == "length"
    assert len(got.output.outputs[0].logprobs) == longest


def test_siblings_are_patched_alike(llm, seal, expected):
    params = sampling(seal("zero", still_unsafe="pass"), max_tokens=NEW_TOKENS, n=3, temperature=1e-3)
    (output,) = llm.generate([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False)
    for completion in output.outputs:
        assert shown(completion.token_ids) == expected["zero"][0]


def test_words_are_not_put_before_an_answer_that_follows_a_grammar(llm, seal):
    from vllm.sampling_params import StructuredOutputsParams

    grammar = StructuredOutputsParams(choice=["yes", "no"])
    directives = seal("words"), seal("zero", still_unsafe="pass")
    params = [sampling(directive, structured_outputs=grammar) for directive in directives]
    begun, patched = ask(llm, [PROMPTS[0]] * 2, params)
    assert (begun.verdict.action, begun.tokens) == ("refuse", [])
    assert patched.verdict.action == "patch"
    assert patched.text.endswith(("yes", "no"))
    assert len(patched.tokens) in (3, 4)


@pytest.mark.parametrize("name", ["zero", "donor-some", "words"])
def test_log_probabilities_are_those_of_the_patched_model(llm, seal, name):
    params = sampling(seal(name, still_unsafe="pass"), max_tokens=NEW_TOKENS, logprobs=2, prompt_logprobs=1)
    (got,) = ask(llm, [PROMPTS[0]], params)
    assert got.verdict.action == "patch"
    assert len(got.output.outputs[0].logprobs) == len(got.tokens)


class TestDonorWithWeightsOfItsOwn:
    """A second checkpoint, loaded beside the served one."""

    @pytest.fixture(scope="class")
    def donor(self, tmp_path_factory):
        return random_model.make_model(tmp_path_factory.mktemp("donor") / "donor", world.SIZES, seed=9)

    @pytest.fixture(scope="class")
    def with_donor(self, tiny_model, tiny_bundle_dir, donor, tmp_path_factory):
        folder = tmp_path_factory.mktemp("with-donor")
        units = folder / "units.json"
        units.write_text(json.dumps({"0": list(range(0, 176, 2)), "2": list(range(90))}))
        command = ["bundle", "patch", str(tiny_bundle_dir), "--model", str(tiny_model), "--name", "donor"]
        command += ["--donor", str(donor), "--units", str(units), "--out", str(folder / "bundle")]
        main(command, standalone_mode=False)
        return folder / "bundle"

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_its_activations_are_taken_over(self, tmp_path, tiny_model, reference, donor, with_donor, ranks):
        patch = Bundle.load(with_donor).patches["donor"]
        own = AutoModelForCausalLM.from_pretrained(donor, dtype="float32").eval()
        prompts = PROMPTS[:6]
        _, twin = folded_twins(reference.model, own)
        expected = answers(reference.model, patch, [tuple(p) for p in prompts], donor=twin)
        result = child.run(
            tmp_path, tiny_model, prompts, bundle=with_donor, patch="donor", max_tokens=NEW_TOKENS,
            options={"donor": str(donor), "tensor_parallel_size": ranks},
            environment={"VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[:ranks])},
        )  # fmt: skip
        assert [[shown(tokens) for tokens in turn] for turn in result.tokens] == [expected] * 2
