"""Searched suffixes on a tiny random model with a planted probe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from guard.bundle import Bundle
from guard.cache import Cache
from guard.checkpoint import Checkpoint
from guard.lab import materialise
from guard.observe import Subject
from guard.scorer import Scorer
from loadtests.redteam.suffixes import Found, Settings, search
from loadtests.redteam.target import LAB_WEIGHTS, Target, TargetError
from tests.loadtests.redteam_world import SITES, make_target, texts

ROOT = Path(__file__).parents[2]
NEVER = -1e9
"""A threshold that no suffix gets below: searches use up their queries."""
SETTINGS = Settings(queries=60, length=8, best=8)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def requests() -> list[str]:
    return texts(16, seed=9)


@pytest.fixture(scope="module")
def by_gradient(target: Target, requests: list[str]) -> list[Found]:
    return search(target, requests, NEVER, "gradient", SETTINGS)


def test_the_gradient_lowers_the_logit_further_than_random_search_with_as_many_queries(
    target: Target, requests: list[str], by_gradient: list[Found]
) -> None:
    at_random = search(target, requests, NEVER, "random", SETTINGS)
    assert {each.queries for each in (*at_random, *by_gradient)} == {SETTINGS.queries}
    before = target.logits([target.encode(text) for text in requests])
    gained = [before - np.array([each.logit for each in found]) for found in (by_gradient, at_random)]
    assert (gained[1] > 0).mean() > 0.8
    assert (gained[0] > gained[1]).mean() > 0.7
    assert gained[0].mean() > 1.2 * gained[1].mean()


def test_a_search_is_its_seeds(target: Target, requests: list[str], by_gradient: list[Found]) -> None:
    assert search(target, requests, NEVER, "gradient", SETTINGS) == by_gradient
    other = search(target, requests, NEVER, "gradient", SETTINGS, seed=1)
    assert all(a.text != b.text for a, b in zip(other, by_gradient, strict=True))


def test_a_suffix_is_text_that_scores_as_it_was_said_to(
    target: Target, requests: list[str], by_gradient: list[Found]
) -> None:
    again = target.probe.logits(target.features([each.text for each in by_gradient]))
    np.testing.assert_allclose(again, [each.logit for each in by_gradient], atol=1e-3)
    for request, each in zip(requests, by_gradient, strict=True):
        assert each.text.startswith(request)
        assert each.text[len(request) :].isascii()
        assert each.text.isprintable()


def test_a_search_ends_when_it_has_passed_and_counts_its_queries(target: Target, requests: list[str]) -> None:
    before = target.logits([target.encode(text) for text in requests])
    cut = float(before.max()) + 1000
    found = search(target, requests, cut, "random", SETTINGS)
    assert {(each.passed, each.queries) for each in found} == {(True, 1)}
    never = search(target, requests, NEVER, "random", Settings(queries=5, length=8))
    assert {(each.passed, each.queries) for each in never} == {(False, 5)}


def test_a_request_without_room_for_a_suffix_is_not_searched(target: Target) -> None:
    long = "word " * 100
    assert search(target, [long], 0.0, "gradient", SETTINGS) == [Found(long, float("inf"), 0, False)]


def test_gradients_are_the_slopes_of_the_logit(target: Target) -> None:
    """Against a difference quotient along the embedding of one token."""
    prompts = [target.encode(text) for text in ("one lamp", "three rivers and a bridge")]
    slopes = target.gradients(prompts, [1, 2], 3)
    table = target.model.get_input_embeddings().weight
    weight = torch.from_numpy(target.probe.weight[0])

    def logit(embedded: torch.Tensor) -> float:
        from guard.capture import capture

        with torch.no_grad(), capture(target.model, SITES, torch.tensor([embedded.shape[1] - 1])) as captured:
            target.model.base_model(inputs_embeds=embedded, use_cache=False)
        return float(captured.features().double() @ weight.double())

    for row, (prompt, start) in enumerate(zip(prompts, (1, 2), strict=True)):
        for place, token in ((0, 7), (2, 100)):
            embedded = table[torch.tensor([prompt])].clone()
            step = 0.01
            embedded[0, start + place] += step * table[token]
            up = logit(embedded)
            embedded[0, start + place] -= 2 * step * table[token]
            assert float(slopes[row, place, token]) == pytest.approx(
                (up - logit(embedded)) / (2 * step), rel=0.05, abs=0.02
            )


def test_a_probe_that_is_not_linear_has_no_gradient_here(target: Target) -> None:
    rows = np.zeros((2, 64), dtype=np.float32)
    other = target.under(Scorer(rows, np.zeros(2, dtype=np.float32), product=True))
    with pytest.raises(TargetError, match="linear probes, this one is product"):
        other.gradients([target.encode("lamp")], [1], 2)


def test_other_models_are_refused(tmp_path: Path) -> None:
    make_target(tmp_path)
    subject = Subject(Checkpoint.open(tmp_path, "mine"), Cache(None))
    with pytest.raises(TargetError, match=r"mine has weights .* no lab model of this repository"):
        Target.of(subject, SITES, Scorer.linear(np.zeros(64, dtype=np.float32), 0.0))
    assert "model" not in vars(subject)  # not even loaded


def test_the_models_that_may_be_attacked_are_the_repositorys() -> None:
    shipped = Bundle.load(ROOT / "models" / "lab" / "bundle").card.model
    assert {shipped.name: shipped.weights_sha256} == LAB_WEIGHTS
    known = json.loads((ROOT / "models" / "lab" / "lab.json").read_text("utf-8"))["variants"]
    assert LAB_WEIGHTS.keys() <= known.keys()
    path = materialise(ROOT / "models" / "lab", shipped.name)
    assert Checkpoint.open(path).weights_sha256 in LAB_WEIGHTS.values()
