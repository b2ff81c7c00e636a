"""Change scores: exact where the twins differ, the same however they are computed, and resumable."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guard.cache import Cache
from guard.locate import contrast
from guard.locate.change import Positions, Sums, add_texts
from guard.locate.contrast import ContrastOptions, locate
from guard.locate.decoding import greedy
from guard.locate.patching import dap_generate
from guard.locate.results import Scores
from guard.locate.twins import folded_twins
from tests.locate import contrast_toys as toys

PROMPTS = toys.prompts()
SHORT = ContrastOptions(new_tokens=6, count=6)
EVERYWHERE: tuple[Positions, ...] = ("predicting", "completion", "prompt_last", "prompt")


def scores_of(found: Scores) -> np.ndarray:
    return found.scores["mlp"]


@pytest.mark.parametrize("kind", toys.KINDS)
def test_scores_are_local_to_what_the_donor_changed(kind: str) -> None:
    recipient, donor = toys.twins(kind)
    scores = scores_of(locate(recipient, donor, PROMPTS, SHORT))
    assert (scores[0] == 0).all()
    assert np.flatnonzero(scores[1]).tolist() == toys.PLANTED[1]
    # Behind the first planted layer others differ as well, because what they read differs.
    assert (scores[2] > 0).all()
    assert np.isnan(scores[3]).all()


@pytest.mark.parametrize("apart", [False, True])
def test_weights_in_bfloat16_keep_scores_local_and_patching_exact(apart: bool) -> None:
    recipient, donor = toys.twins(dtype=torch.bfloat16, apart=apart)
    found = locate(recipient, donor, PROMPTS, SHORT)
    assert scores_of(found).dtype == np.float64
    assert np.flatnonzero(scores_of(found)[:2].any(axis=0)).tolist() == toys.PLANTED[1]
    answers = dap_generate(recipient, donor, toys.EVERY, PROMPTS[:1], new_tokens=8)
    assert answers == greedy(donor, PROMPTS[:1], new_tokens=8)


def test_patching_units_that_include_the_planted_ones_reproduces_the_donor() -> None:
    recipient, donor = toys.twins()
    for count in (6, 48, 144):
        found = locate(recipient, donor, PROMPTS, ContrastOptions(new_tokens=6, count=count))
        chosen = found.selected["mlp"]
        assert chosen.sum() == count
        if all(chosen[layer, units].all() for layer, units in toys.PLANTED.items()):
            break
    assert count < 144, "the planted units are not among the highest third"
    units = toys.sites(
        {layer: np.flatnonzero(chosen[layer]).tolist() for layer in (1, 2) if chosen[layer].any()}
    )
    answers = dap_generate(recipient, donor, units, PROMPTS, new_tokens=8)
    assert answers == greedy(donor, PROMPTS, new_tokens=8) != greedy(recipient, PROMPTS, new_tokens=8)


@pytest.mark.parametrize("positions", EVERYWHERE)
@pytest.mark.parametrize("source", ["recipient", "donor"])
def test_scores_equal_those_of_stored_activations(positions: Positions, source: Any) -> None:
    recipient, donor = toys.twins()
    options = ContrastOptions(positions=positions, generate_with=source, new_tokens=6)
    found = locate(recipient, donor, PROMPTS, options, batch_tokens=40)
    answers = greedy(recipient if source == "recipient" else donor, PROMPTS, new_tokens=6)
    span = {
        "predicting": lambda p, a: slice(len(p) - 1, len(p) + len(a) - 1),
        "completion": lambda p, a: slice(len(p), len(p) + len(a)),
        "prompt_last": lambda p, a: slice(len(p) - 1, len(p)),
        "prompt": lambda p, a: slice(0, len(p)),
    }[positions]
    stored = []
    for twin in (recipient, donor):
        texts = [
            torch.stack(toys.activations(twin, (*prompt, *answer)))[:, span(prompt, answer)]
            for prompt, answer in zip(PROMPTS, answers, strict=True)
        ]
        stored.append(torch.cat(texts, dim=1).numpy())
    ours, theirs = stored
    expected = np.sqrt(((ours - theirs) ** 2).mean(1))
    # Norms are float32 in transformers, and round differently in other batches.
    np.testing.assert_allclose(scores_of(found)[:3], expected[:3], rtol=1e-5, atol=1e-6)
    assert found.cost["compared"] == ours.shape[1]
    for name, array in (("recipient", ours), ("donor", theirs)):
        np.testing.assert_allclose(found.extra[f"mean.{name}"], array.mean(1), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.extra[f"std.{name}"], array.std(1), rtol=1e-5, atol=1e-5)


def test_streaming_sums_equal_sums_of_everything_stored() -> None:
    random = np.random.default_rng(0)
    # Far from zero, and in the weights' dtype: sums in bfloat16 or float32 would show.
    ours = torch.tensor(random.normal(50.0, 1.0, (4000, 5))).bfloat16()
    theirs = (ours.double() + torch.tensor(random.normal(0.0, 1.0, (4000, 5)))).bfloat16()
    sums = Sums()
    for start in range(0, 4000, 37):
        sums.add(1, ours[start : start + 37], theirs[start : start + 37])
    a, b = ours.double().numpy(), theirs.double().numpy()
    expected = [((a - b) ** 2).sum(0), a.sum(0), (a**2).sum(0), b.sum(0), (b**2).sum(0)]
    array = sums.array(2)
    np.testing.assert_allclose(array[:, 1], expected, rtol=1e-13)
    assert np.isnan(array[:, 0]).all()


def test_memory_of_the_sums_does_not_grow_with_the_tokens() -> None:
    sums = Sums()
    for _ in range(50):
        sums.add(0, torch.ones(100, 8), torch.zeros(100, 8))
    held = list(sums._sums.values())
    assert [tuple(value.shape) for value in held] == [(5, 8)]


@pytest.mark.parametrize("positions", EVERYWHERE)
def test_padding_never_enters_a_statistic(positions: Positions) -> None:
    recipient, donor = toys.twins(apart=True)
    options = ContrastOptions(positions=positions, new_tokens=6)
    expected = locate(recipient, donor, PROMPTS, options)
    texts = list(expected.completions)
    longest = max(len(prompt) + len(answer) for prompt, answer in texts)
    handles = [
        handle
        for twin in (recipient, donor)
        for block in twin.model.model.layers
        for handle in _nan_in_padding(block.mlp.down_proj, [len(p) + len(a) for p, a in texts])
    ]
    sums = Sums()
    add_texts(sums, recipient, donor, [(layer, "mlp") for layer in range(4)], texts, positions)
    for handle in handles:
        handle.remove()
    assert len({len(p) + len(a) for p, a in texts}) > 1
    assert longest > min(len(p) + len(a) for p, a in texts)
    array = sums.array(4)
    assert np.isfinite(array).all()
    scores = np.sqrt(array[0] / expected.cost["compared"])
    np.testing.assert_allclose(scores[:3], scores_of(expected)[:3], rtol=1e-9, atol=1e-12)


def _nan_in_padding(linear: Any, lengths: list[int]) -> list[Any]:
    """What later hooks see is NaN behind each text; what the layer computes is as before."""
    clean: list[torch.Tensor] = []

    def poison(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        clean.append(inputs[0])
        seen = inputs[0].clone()
        for row, length in enumerate(lengths):
            seen[row, length:] = torch.nan
        return (seen,)

    def restore(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where(output.isnan(), torch.nn.functional.linear(clean.pop(), linear.weight), output)

    return [linear.register_forward_pre_hook(poison), linear.register_forward_hook(restore)]


def test_exact_token_ids_are_recorded() -> None:
    recipient, donor = toys.twins()
    found = locate(recipient, donor, PROMPTS, SHORT)
    assert found.completions == tuple(zip(PROMPTS, greedy(recipient, PROMPTS, new_tokens=6), strict=True))
    ours = locate(recipient, donor, PROMPTS, ContrastOptions(new_tokens=6, generate_with="donor"))
    assert ours.completions == tuple(zip(PROMPTS, greedy(donor, PROMPTS, new_tokens=6), strict=True))


def test_prompt_positions_need_no_answer() -> None:
    recipient, donor = toys.twins()
    calls: list[int] = []
    handle = recipient.model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = locate(recipient, donor, PROMPTS, ContrastOptions(positions="prompt_last"))
    handle.remove()
    # The decoder alone ran: nothing asked for logits.
    assert not calls
    assert found.completions == tuple((prompt, ()) for prompt in PROMPTS)
    assert found.cost["compared"] == len(PROMPTS)
    assert found.cost["tokens"] == 2 * sum(map(len, PROMPTS))
    assert found.cost["forward_passes"] == 2 * len(PROMPTS)


def test_the_selection_is_a_share_or_a_number_of_the_candidates() -> None:
    recipient, donor = toys.twins()
    default = locate(recipient, donor, PROMPTS, ContrastOptions(new_tokens=6))
    assert default.selected["mlp"].sum() == round(0.05 * 3 * toys.WIDTH)
    counted = locate(recipient, donor, PROMPTS, ContrastOptions(new_tokens=6, count=17))
    assert counted.selected["mlp"].sum() == 17
    chosen = counted.selected["mlp"]
    scores = scores_of(counted)
    assert scores[chosen].min() >= np.nanmax(np.where(chosen, np.nan, scores))


@pytest.mark.parametrize("excluded", [0, 1, 2])
def test_the_last_layers_are_no_candidates(excluded: int) -> None:
    recipient, donor = toys.twins()
    found = locate(recipient, donor, PROMPTS, ContrastOptions(new_tokens=6, exclude_last_n=excluded))
    candidates = ~np.isnan(scores_of(found)).all(axis=1)
    assert candidates.tolist() == [layer < 4 - excluded for layer in range(4)]
    # Means are for patching, which may use any layer.
    assert all(np.isfinite(array).all() for array in found.extra.values())


def test_a_vector_folded_into_the_weights_gives_the_same_scores() -> None:
    recipient, donor = toys.twins()
    expected = locate(recipient, donor, PROMPTS, SHORT)
    twins = folded_twins(recipient.model, toys.fold(recipient.model, donor.vector))
    assert sorted(twins[1].folded) == sorted(toys.PLANTED)
    for layer, factor in donor.vector.items():
        torch.testing.assert_close(twins[1].folded[layer], factor, rtol=1e-12, atol=1e-12)
    found = locate(*twins, PROMPTS, SHORT)
    np.testing.assert_allclose(scores_of(found)[:3], scores_of(expected)[:3], rtol=1e-4, atol=1e-6)
    assert (found.selected["mlp"] == expected.selected["mlp"]).all()


def test_factors_survive_the_rounding_of_bfloat16_and_are_one_elsewhere() -> None:
    base = toys.model(dtype=torch.bfloat16)
    factors = toys.vector()
    _, donor = folded_twins(base, toys.fold(base, factors))
    for layer, factor in factors.items():
        torch.testing.assert_close(donor.folded[layer], factor, rtol=2e-3, atol=0)
        untouched = factor == 1
        assert (donor.folded[layer][untouched] == 1).all()


def test_other_value_vectors_are_compared_as_they_are_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    base = toys.model()
    other = toys.fold(base, toys.vector())
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[:, 11:13] += torch.randn(32, 2, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        _, donor = folded_twins(base, other)
    assert "value vectors of 2 neurons" in caplog.text
    assert donor.folded[1][11:13].tolist() == [1.0, 1.0]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "CHUNK", 2)
    recipient, donor = toys.twins()
    expected = locate(recipient, donor, PROMPTS, SHORT)
    cache = Cache(tmp_path)
    real = contrast.add_texts
    done: list[Any] = []

    def stopping(*given: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(given)
        real(*given)

    monkeypatch.setattr(contrast, "add_texts", stopping)
    with pytest.raises(KeyboardInterrupt):
        locate(recipient, donor, PROMPTS, SHORT, cache=cache, identity="twins")
    done.clear()
    resumed = locate(recipient, donor, PROMPTS, SHORT, cache=cache, identity="twins")
    assert len(done) == 1
    np.testing.assert_allclose(scores_of(resumed)[:3], scores_of(expected)[:3], rtol=1e-12)
    assert resumed.completions == expected.completions
    done.clear()
    locate(recipient, donor, PROMPTS, SHORT, cache=cache, identity="twins")
    assert not done
    # Nothing of other models is taken for these.
    with pytest.raises(KeyboardInterrupt):
        locate(recipient, donor, PROMPTS, SHORT, cache=cache, identity="others")
