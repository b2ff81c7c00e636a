"""Limits of the monitor: what stops an answer, and how many benign ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta

from guard.answers import answer, answer_tokens
from guard.cache import Cache
from guard.checkpoint import Checkpoint
from guard.monitor_fit import greedy_answers, limits, stopped_at, stopped_by, watched
from guard.observe import Subject
from guard.pooling import Pooling, running
from guard.prompts import Tokens
from guard.sequence import SequenceScorer
from guard.sequence_scores import outputs
from guard.units import every_unit
from tests.guard import worlds

RISING = np.array([0.0, 3.0, 1.0, 2.0, 2.0, 2.5, 0.0], dtype=np.float32)


@pytest.mark.parametrize(("debounce", "highest"), [(1, 3.0), (2, 2.0), (3, 2.0), (4, 1.0), (7, 0.0)])
def test_an_answer_is_stopped_up_to_the_largest_least_of_scores_in_a_row(
    debounce: int, highest: float
) -> None:
    assert stopped_by(RISING, debounce) == highest
    assert stopped_at(RISING, highest, debounce) is not None
    assert stopped_at(RISING, highest + 0.01, debounce) is None


def test_an_answer_shorter_than_the_debounce_is_never_stopped() -> None:
    assert stopped_by(RISING, 8) == -np.inf
    assert stopped_at(RISING, -100.0, 8) is None


def test_the_place_of_a_stop_counts_the_tokens_that_were_scored() -> None:
    assert stopped_at(RISING, 3.0, 1) == 2
    assert stopped_at(RISING, 2.0, 3) == 6
    assert stopped_at(RISING, 0.0, 4) == 4


def test_a_limit_stops_its_share_of_the_answers_it_was_set_on() -> None:
    random = np.random.default_rng(0)
    seen = [random.normal(size=30).astype(np.float32) for _ in range(1000)]
    found, omitted = limits(seen)
    assert [(limit.false_positive_rate, limit.debounce) for limit in found] == [
        (0.01, 1),
        (0.01, 4),
        (0.01, 16),
    ]
    for limit in found:
        stopped = sum(stopped_at(each, limit.logit, limit.debounce) is not None for each in seen)
        assert stopped == 10
        assert limit.answers == 1000
        assert limit.upper95 == pytest.approx(beta.ppf(0.975, 11, 990))
    assert omitted == ["a monitor that stops 0.001 of benign answers needs 3000 of them, there are 1000"]


def test_empty_and_short_answers_count_as_not_stopped() -> None:
    random = np.random.default_rng(1)
    seen = [random.normal(size=10).astype(np.float32) for _ in range(150)]
    found, omitted = limits([*seen, *[np.empty(0, np.float32)] * 150])
    assert [limit.debounce for limit in found] == [1, 4]
    assert found[0].answers == 300
    assert sum(stopped_at(each, found[0].logit, 1) is not None for each in seen) == 3
    assert "no benign answer has 16 tokens, so that no limit can be set" in omitted
    short, _ = limits([*seen[:1], *[np.empty(0, np.float32)] * 299])
    assert np.isfinite(short[0].logit)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    root = tmp_path_factory.mktemp("model")
    path = worlds.checkpoint(root / "model", worlds.model(num_hidden_layers=2))
    return Subject(Checkpoint.open(path), Cache(root / "cache"))


PROMPTS: list[Tokens] = [tuple(range(9, 9 + n)) for n in (3, 20, 7, 12)]


def test_answers_as_tokens_are_the_answers_as_text(subject: Subject) -> None:
    tokens = greedy_answers(subject, PROMPTS, 15)
    again = greedy_answers(subject, PROMPTS, 15)
    assert tokens == again == answer_tokens(subject.model, subject.tokenizer, PROMPTS, new_tokens=15)
    texts = [subject.tokenizer.decode(each, skip_special_tokens=True) for each in tokens]
    assert texts == answer(subject.model, subject.tokenizer, PROMPTS, new_tokens=15)
    end = subject.tokenizer.eos_token_id
    assert all(end not in each[:-1] and len(each) <= 15 for each in tokens)


@pytest.mark.parametrize(
    "pooling",
    [
        Pooling(kind="ema", rate=0.5, window=10),
        Pooling(kind="rolling", window=6),
        Pooling(kind="softmax", temperature=0.5, window=9),
        Pooling(kind="attention", heads=2, window=5),
    ],
    ids=lambda p: p.kind,
)
def test_a_monitor_sees_the_last_tokens_prompt_included(subject: Subject, pooling: Pooling) -> None:
    units = every_unit(subject.checkpoint.shape, ("mlp",))
    random = np.random.default_rng(0)
    weight = random.normal(size=(pooling.channels, subject.width(units))).astype(np.float32)
    probe = SequenceScorer(pooling, weight, np.zeros(pooling.channels, np.float32))
    answers: list[Tokens] = [(40, 41, 42, 43, 44, 45, 46, 47), (50,), (), (60, 0)]
    found = watched(subject, probe, units, PROMPTS, answers)
    for prompt, said, scores in zip(PROMPTS, answers, found, strict=True):
        # The last token of an answer is made, but never read.
        (every,) = outputs(subject, probe.weight, probe.bias, units, [(*prompt, *said[:-1])])
        assert len(scores) == len(said[:-1])
        assert scores == pytest.approx(running(pooling, every)[len(prompt) :], rel=1e-4)
