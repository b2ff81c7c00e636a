"""Taking units out: 1 where nothing of a behaviour is left, 0 where nothing changes, and what is damaged."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from guard.locate.ablation import Head, ablated
from guard.locate.causal import SELECTED
from guard.locate.deactivate import deactivated
from guard.locate.decoding import greedy
from guard.locate.errors import LocateError
from guard.locate.removal import likelihood, measure_removal, without
from guard.locate.twins import Twin
from guard.locate.unit_set import UnitSet
from guard.prompts import Tokens
from tests.locate import contrast_toys as toys
from tests.locate import unit_sets

PROMPTS = toys.prompts(10)
SHAPE: dict[str, Any] = {"layers": 4, "mlp_width": toys.WIDTH, "heads": 4, "head_dim": 8}


def selection(component: Any, width: int, chosen: dict[int, list[int]]) -> UnitSet:
    """A set of a toy model."""
    mask = np.zeros((toys.LAYERS, width), dtype=np.bool_)
    for layer, units in chosen.items():
        mask[layer, units] = True
    provenance = unit_sets.provenance(model=unit_sets.model(**SHAPE))
    return UnitSet(provenance, {component: mask.astype(np.float64)}, {component: mask})


def first_token(_prompts: Any, answers: Any) -> list[float]:
    """A cost that tells answers apart."""
    return [float(answer[0]) if answer else 0.0 for answer in answers]


def test_what_removal_does_is_measured_against_a_model_without_the_behaviour() -> None:
    model = toys.model()
    units = {1: [3, 17, 40], 2: list(range(30))}
    found, idle = selection("mlp", toys.WIDTH, units), selection("mlp", toys.WIDTH, {})
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer, chosen in units.items():
            other.model.layers[layer].mlp.down_proj.weight[:, chosen] = 0.0
    twins = Twin(model), Twin(other)
    measured = measure_removal(*twins, PROMPTS, found, {"idle": idle}, first_token, new_tokens=3)
    effects = measured.effects
    assert effects[SELECTED].value == 1.0
    assert effects[SELECTED].units == 33
    assert effects["idle"].value == 0.0
    assert measured.costs["recipient"].tolist() == first_token(
        PROMPTS, greedy(twins[0], PROMPTS, new_tokens=3)
    )
    assert measured.costs["donor"].tolist() == measured.costs[SELECTED].tolist()
    assert measured.comparison is not None


def logits(model: Any, prompt: Tokens) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([prompt])).logits
    return found


def test_heads_are_taken_out_in_the_way_that_is_named() -> None:
    model = toys.model()
    found = selection("attention", 4, {0: [1], 3: [0, 2]})
    members = [Head(0, 1), Head(3, 0), Head(3, 2)]
    seen = {}
    for how in ("undifferentiated", "scaling"):
        with without(model, found, heads=how):  # type: ignore[arg-type]
            seen[how] = logits(model, PROMPTS[0])
        with ablated(model, members, how):  # type: ignore[arg-type]
            assert torch.equal(seen[how], logits(model, PROMPTS[0]))
    with without(model, found):
        zeroed = logits(model, PROMPTS[0])
    with deactivated(model, found.units()):
        assert torch.equal(zeroed, logits(model, PROMPTS[0]))
    assert not torch.allclose(seen["undifferentiated"], zeroed)
    assert not torch.equal(seen["undifferentiated"], logits(model, PROMPTS[0]))
    neurons = selection("mlp", toys.WIDTH, {0: [1]})
    with pytest.raises(LocateError, match="only whole heads"), without(model, neurons, heads="scaling"):
        pass


def test_the_likelihood_is_the_mean_log_probability_of_an_answers_tokens() -> None:
    model = toys.model()
    texts = [(prompt, (7, 9, 200)[: 1 + number % 3]) for number, prompt in enumerate(PROMPTS)]
    expected = []
    for prompt, answer in texts:
        rows = logits(model, (*prompt, *answer))[0].double().log_softmax(-1)
        told = [float(rows[len(prompt) - 1 + step, token]) for step, token in enumerate(answer)]
        expected.append(np.mean(told))
    found = likelihood(Twin(model), texts, batch_tokens=40)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_control_with_the_name_of_something_else_is_refused() -> None:
    model, found = toys.model(), selection("mlp", toys.WIDTH, {0: [1]})
    for name in (SELECTED, "donor"):
        with pytest.raises(LocateError, match="a control may not be called"):
            measure_removal(
                Twin(model), Twin(model), PROMPTS[:1], found, {name: found}, first_token, new_tokens=1
            )
