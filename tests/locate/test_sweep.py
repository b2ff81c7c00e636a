"""Sweeps over sets of units: one donor pass, log-probabilities of the donor's own answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guard.locate.decoding import greedy
from guard.locate.errors import LocateError
from guard.locate.sweep import sweep
from guard.locate.tax import cross_patch, shared_units
from guard.locate.twins import Twin, folded_twins
from guard.prompts import Tokens
from guard.sites import shape_of
from tests.locate import contrast_toys as toys

PROMPTS = toys.prompts()
PLANTED = toys.sites(toys.PLANTED)


def log_prob(twin: Twin, prompt: Tokens, answer: Tokens) -> float:
    with torch.inference_mode(), twin.scaled():
        logits = twin.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    said = torch.tensor(answer)[:, None]
    return float(logits.double().log_softmax(-1).gather(-1, said).sum())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_sweep_goes_from_the_recipient_to_the_donor(kind: str) -> None:
    recipient, donor = toys.twins(kind)
    texts = list(zip(PROMPTS, greedy(donor, PROMPTS, new_tokens=6), strict=True))
    some = toys.sites({1: toys.PLANTED[1]})
    found = sweep(recipient, donor, [(), some, PLANTED, toys.EVERY], texts, batch_tokens=50)
    assert found.shape == (4, len(PROMPTS))
    for column, text in enumerate(texts):
        assert found[0, column] == pytest.approx(log_prob(recipient, *text), abs=1e-4)
        assert found[3, column] == pytest.approx(log_prob(donor, *text), abs=1e-4)
    np.testing.assert_allclose(found[2], found[3], atol=1e-9)
    assert np.abs(found[1] - found[0]).max() > 1e-3
    assert np.abs(found[1] - found[3]).max() > 1e-3


def test_one_pass_of_the_donor_serves_all_sets() -> None:
    recipient, donor = toys.twins(apart=True)
    texts = list(zip(PROMPTS, greedy(donor, PROMPTS, new_tokens=3), strict=True))
    passes: list[int] = []
    handle = donor.model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    sweep(recipient, donor, [PLANTED, toys.EVERY, ()], texts)
    handle.remove()
    assert len(passes) == 1


def test_texts_without_an_answer_are_an_error() -> None:
    recipient, donor = toys.twins()
    for texts in ([], [((5, 6), ())]):
        with pytest.raises(LocateError, match="none of them empty"):
            sweep(recipient, donor, [PLANTED], texts)


def test_units_that_two_sets_share_are_found() -> None:
    shape = shape_of(toys.model().config)
    first, second = toys.neurons({0: [1, 2], 1: [3, 17]}), toys.neurons({1: [17, 20], 2: [5]})
    assert shared_units(first, second, shape) == toys.sites({1: [17]})
    with pytest.raises(LocateError, match="share no unit"):
        shared_units(first, toys.neurons({3: [0]}), shape)
    with pytest.raises(LocateError, match="among"):
        shared_units(first, toys.unit_set("attention", (toys.LAYERS, 4), [(0, 1)]), shape)


@pytest.mark.parametrize("folded", [False, True])
def test_patching_both_ways_turns_each_twin_into_the_other(folded: bool) -> None:
    first, second = toys.twins()
    if folded:
        first, second = folded_twins(first.model, toys.fold(first.model, second.vector))
    ours = greedy(first, PROMPTS, new_tokens=6)
    theirs = greedy(second, PROMPTS, new_tokens=6)

    def unlike(wanted: list[Tokens]) -> object:
        return lambda _prompts, answers: [float(a != b) for a, b in zip(answers, wanted, strict=True)]

    costs = {"harm": unlike(theirs), "unhelpfulness": unlike(ours)}
    found = cross_patch(first, second, PLANTED, PROMPTS, costs, new_tokens=6, resamples=50)  # type: ignore[arg-type]
    harm, unhelpful = found.into_first["harm"], found.into_first["unhelpfulness"]
    assert (harm.after, harm.donor, unhelpful.before) == (0.0, 0.0, 0.0)
    assert harm.before == unhelpful.after > 0.0
    assert harm.low <= harm.after - harm.before <= harm.high <= 0.0
    assert found.into_second["unhelpfulness"].after == 0.0
    assert found.into_second["harm"].before == 0.0
