"""A sequence probe in the running engine: every token's score kept by KV slot, prompts and answers."""

from __future__ import annotations

import random

import numpy as np
import pytest

from guard.engine import selftest
from guard.engine.config import AUDIENCE_ENV, KEY_FILE_ENV, STOP_KEY
from guard.monitor import Monitor, Stop
from guard.pooling import Pooling
from guard.verdict import Decision, Directive, Rule
from loadtests.random_model import with_sequence_probe
from tests.e2e.inprocess import ask, guarded, sampling, scheduler, shut_down
from tests.engine import world

ATTENTION = Pooling(kind="attention", heads=2, window=32)
OBSERVE = Decision(policy="test", mode="observe", rules=(Rule(above=0.5, action="refuse"),))
REFUSE = OBSERVE.model_copy(update={"mode": "enforce"})
CHECK = OBSERVE.model_copy(update={"mode": "check"})


@pytest.fixture(scope="module")
def bundle(tiny_bundle, reference):
    prompts = world.prompts(60, seed=1000)
    return with_sequence_probe(tiny_bundle, reference, ATTENTION, prompts)


@pytest.fixture(scope="module")
def llm(bundle, tiny_model, key_file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_FILE_ENV, str(key_file))
        patch.setenv(AUDIENCE_ENV, "engine")
        llm = guarded(tiny_model, bundle.save(tiny_model.parent / "sequence-bundle"))
        selftest.run(llm, bundle.card.self_test.prompts)
        yield llm
        shut_down(llm)


@pytest.fixture(scope="module")
def seal(keys):
    def make(decision: Decision) -> str:
        return Directive.issue(decision, audience="engine", body=b"").seal(keys)

    return make


@pytest.fixture(scope="module")
def expected(reference, bundle):
    """Logit of a prompt by transformers, one pass over all of it."""
    return lambda prompt: bundle.sequence.logit(reference.features_of_all(prompt))


def logits(answers):
    return np.array([answer.verdict.logit for answer in answers])


def test_logits_equal_transformers_in_chunks_and_over_a_cache(llm, expected, seal):
    """Prompts of up to 450 tokens in chunks of 96, with shared beginnings, twice."""
    prompts = world.prompts(40, seed=61) + world.prompts(12, seed=62, shortest=300, longest=450)
    assert sum(len(p) > 4 * 96 for p in prompts) >= 3
    want, cached = np.array([expected(p) for p in prompts]), []
    for _ in range(2):
        answers = ask(llm, prompts, sampling(seal(CHECK)))
        assert np.abs(logits(answers) - want).max() <= 1e-3
        assert {a.verdict.read for a in answers} == {"prompt"}
        cached.append(sum(a.cached > 0 for a in answers))
    assert cached[1] > 0


def test_later_turn_reads_the_scores_of_the_answer_before(llm, expected, seal):
    """What was generated was scored then, and is found with the cache: it is not computed again."""
    first = world.prompts(6, seed=63, shortest=40, longest=90)
    answers = ask(llm, first, sampling(seal(OBSERVE), max_tokens=70, ignore_eos=True))
    later = [p + a.tokens + [5, 6, 7] for p, a in zip(first, answers, strict=True)]
    again = ask(llm, later, sampling(seal(CHECK)))
    assert all(a.cached >= len(p) + 32 for p, a in zip(first, again, strict=True))
    np.testing.assert_allclose(logits(again), [expected(p) for p in later], atol=1e-3)


def test_preempted_requests_score_the_same(llm, expected, seal):
    """Eight at a time with long answers in 40 blocks: they push each other out, answers half done."""
    prompts = world.prompts(16, seed=64, shortest=60, longest=120)
    before = scheduler(llm).kv_cache_manager.block_pool
    assert before is not None
    pushed = []
    preempt = scheduler(llm)._preempt_request
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            scheduler(llm), "_preempt_request", lambda r, *a, **k: (pushed.append(r), preempt(r, *a, **k))[1]
        )
        answers = ask(llm, prompts, sampling(seal(OBSERVE), max_tokens=110, ignore_eos=True))
    assert pushed
    np.testing.assert_allclose(logits(answers), [expected(p) for p in prompts], atol=1e-3)
    later = [p + a.tokens[:90] for p, a in zip(prompts, answers, strict=True)]
    np.testing.assert_allclose(
        logits(ask(llm, later, sampling(seal(CHECK)))), [expected(p) for p in later], atol=1e-3
    )


def test_actions_follow_the_pooled_score(llm, expected, seal):
    prompts = [p for p in world.prompts(40, seed=65) if abs(expected(p)) > 0.01]
    answers = ask(llm, prompts, sampling(seal(REFUSE)))
    refused = [a.verdict.action == "refuse" for a in answers]
    assert refused == [expected(p) > 0 for p in prompts]
    assert 0 < sum(refused) < len(refused)
    assert all((a.tokens == []) == stopped for a, stopped in zip(answers, refused, strict=True))


class TestMonitor:
    """Answers are watched as they grow; what is stopped is a prefix of the answer that was not watched."""

    @pytest.fixture(scope="class")
    def grown(self, llm, seal):
        prompts = world.prompts(24, seed=66, shortest=10, longest=60)
        answers = ask(llm, prompts, sampling(seal(OBSERVE), max_tokens=60, ignore_eos=True))
        return [(p, a.tokens) for p, a in zip(prompts, answers, strict=True)]

    @pytest.fixture(scope="class")
    def running(self, grown, reference, bundle):
        """The pooled score after each token of each answer, by transformers; of the last there is none."""
        seen = []
        for prompt, tokens in grown:
            values = bundle.sequence.running(reference.features_of_all([*prompt, *tokens[:-1]]))
            seen.append(values[len(prompt) :])
        return seen

    def cut(self, values, limit, debounce):
        """After how many tokens an answer must be stopped, found by a plain loop; None: never."""
        streak = 0
        for tokens, value in enumerate(values, 1):
            streak = streak + 1 if value >= limit else 0
            if streak == debounce:
                return tokens
        return None

    def limit(self, running):
        """A limit that no value lies near, with some answers on both sides of it."""
        values = np.sort(np.concatenate(running))
        upper = values[int(0.8 * len(values)) :]
        gap = int(np.argmax(np.diff(upper)[: len(upper) // 2]))
        return float((upper[gap] + upper[gap + 1]) / 2)

    @pytest.mark.parametrize("debounce", [1, 3])
    def test_answers_end_where_the_offline_scores_say(self, llm, grown, running, keys, debounce):
        limit = self.limit(running)
        decision = OBSERVE.model_copy(
            update={"mode": "enforce", "rules": (), "monitor": Monitor(logit=limit, debounce=debounce)}
        )
        orders = [Directive.issue(decision, audience="engine", body=b"") for _ in grown]
        params = [
            sampling(order.seal(keys), max_tokens=60, ignore_eos=True, **({"logprobs": 0} if i % 2 else {}))
            for i, order in enumerate(orders)
        ]
        answers = ask(llm, [p for p, _ in grown], params)
        want = [self.cut(values, limit, debounce) for values in running]
        assert 3 <= sum(tokens is not None for tokens in want) < len(want)
        for answer, (_, whole), tokens, order in zip(answers, grown, want, orders, strict=True):
            assert answer.verdict.action == "pass"
            assert answer.tokens == whole[:tokens]
            if tokens is None:
                assert answer.finish_reason == "length"
                continue
            stop = Stop.of_reason(answer.stop_reason, keys, nonce=order.nonce)
            assert (answer.finish_reason, stop.tokens) == ("stop", tokens)
            assert answer.output.kv_transfer_params[STOP_KEY] == {"outcome": "stopped", "tokens": tokens}
        assert not scheduler(llm).ledger.watched

    def test_observed_answers_go_on_and_say_what_would_have_been(self, llm, grown, running, seal):
        limit = self.limit(running)
        decision = OBSERVE.model_copy(update={"monitor": Monitor(logit=limit, debounce=2)})
        answers = ask(llm, [p for p, _ in grown], sampling(seal(decision), max_tokens=60, ignore_eos=True))
        assert [a.tokens for a in answers] == [tokens for _, tokens in grown]

    def test_preempted_answers_are_watched_over_the_gap(self, llm, reference, bundle, seal, keys):
        prompts = world.prompts(14, seed=67, shortest=60, longest=120)
        plain = ask(llm, prompts, sampling(seal(OBSERVE), max_tokens=110, ignore_eos=True))
        running = [
            bundle.sequence.running(reference.features_of_all([*p, *a.tokens[:-1]]))[len(p) :]
            for p, a in zip(prompts, plain, strict=True)
        ]
        limit = self.limit(running)
        decision = OBSERVE.model_copy(
            update={"mode": "enforce", "rules": (), "monitor": Monitor(logit=limit, debounce=4)}
        )
        scheduler(llm).reset_prefix_cache()
        answers = ask(llm, prompts, sampling(seal(decision), max_tokens=110, ignore_eos=True))
        want = [self.cut(values, limit, 4) for values in running]
        for answer, whole, tokens in zip(answers, plain, want, strict=True):
            assert answer.tokens == whole.tokens[:tokens]

    def test_unwatched_neighbours_answer_in_full(self, llm, grown, running, seal):
        watched = OBSERVE.model_copy(
            update={"mode": "enforce", "rules": (), "monitor": Monitor(logit=-1e9, debounce=2)}
        )
        order = random.Random(1).sample(range(len(grown)), len(grown))
        params = [
            sampling(seal(watched if i % 2 else OBSERVE), max_tokens=60, ignore_eos=True) for i in order
        ]
        answers = ask(llm, [grown[i][0] for i in order], params)
        for i, answer in zip(order, answers, strict=True):
            assert answer.tokens == (grown[i][1][:2] if i % 2 else grown[i][1])

    @pytest.mark.parametrize(("patch", "cut"), [("quiet", 2), ("begun", 7)])
    def test_patched_answers_are_watched_as_well(self, llm, grown, seal, patch, cut):
        """Words that the answer was given to begin with count as one token: they are read together."""
        rule = Rule(above=0.0, action="patch", patch=patch, still_unsafe="pass")
        patched = Decision(policy="test", rules=(rule,))
        watched = patched.model_copy(update={"monitor": Monitor(logit=-1e9, debounce=2)})
        prompts = [prompt for prompt, _ in grown]
        whole = ask(llm, prompts, sampling(seal(patched), max_tokens=20, ignore_eos=True))
        cut_short = ask(llm, prompts, sampling(seal(watched), max_tokens=20, ignore_eos=True))
        assert [a.verdict.action for a in cut_short] == ["patch"] * len(prompts)
        assert [a.tokens for a in cut_short] == [a.tokens[:cut] for a in whole]
