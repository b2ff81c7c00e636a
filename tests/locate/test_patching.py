"""Dynamic activation patching: exact where theory says exact, the same with and without caches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from guard.bundle import Site
from guard.locate.decoding import Step, generate, greedy, plain
from guard.locate.errors import LocateError
from guard.locate.hooks import at_inputs
from guard.locate.patching import dap_generate, one_batch, two_caches, units_of
from guard.locate.twins import Twin, folded_twins, swapped
from guard.sites import shape_of
from guard.units import Units
from tests.guard import worlds
from tests.locate import contrast_toys as toys

PROMPTS = toys.prompts()
Make = Callable[[Twin, Twin, Units], Step]


@pytest.mark.parametrize("kind", toys.KINDS)
def test_every_neuron_patched_is_the_donor_bit_for_bit(kind: str) -> None:
    recipient, donor = toys.twins(kind)
    expected = toys.logits(plain(donor), PROMPTS)
    assert torch.equal(toys.logits(two_caches(recipient, donor, toys.EVERY), PROMPTS), expected)
    assert not torch.allclose(toys.logits(plain(recipient), PROMPTS), expected, atol=1e-3)


@pytest.mark.parametrize("kind", toys.KINDS)
def test_the_planted_units_patched_are_the_donor_bit_for_bit(kind: str) -> None:
    recipient, donor = toys.twins(kind)
    patched = toys.logits(two_caches(recipient, donor, toys.sites(toys.PLANTED)), PROMPTS)
    assert torch.equal(patched, toys.logits(plain(donor), PROMPTS))


@pytest.mark.parametrize("layer", [1, 2])
def test_without_one_planted_unit_the_donor_is_not_reached(layer: int) -> None:
    recipient, donor = toys.twins()
    without = {**toys.PLANTED, layer: toys.PLANTED[layer][1:]}
    patched = toys.logits(two_caches(recipient, donor, toys.sites(without)), PROMPTS)
    assert not torch.allclose(patched, toys.logits(plain(donor), PROMPTS), atol=1e-4)


def test_nothing_patched_is_the_recipient_bit_for_bit() -> None:
    recipient, donor = toys.twins(apart=True)
    expected = toys.logits(plain(recipient), PROMPTS)
    assert torch.equal(toys.logits(two_caches(recipient, donor, ()), PROMPTS), expected)
    assert dap_generate(recipient, donor, (), PROMPTS, new_tokens=6) == greedy(
        recipient, PROMPTS, new_tokens=6
    )


@pytest.mark.parametrize("apart", [False, True])
def test_greedy_text_of_a_patched_recipient_is_the_donors(apart: bool) -> None:
    recipient, donor = toys.twins(apart=apart)
    expected = greedy(donor, PROMPTS, new_tokens=8)
    assert expected != greedy(recipient, PROMPTS, new_tokens=8)
    assert dap_generate(recipient, donor, toys.EVERY, PROMPTS, new_tokens=8) == expected


def test_neurons_do_not_make_up_for_a_donor_with_other_attention() -> None:
    recipient, donor = toys.twins(apart=True)
    with torch.no_grad():
        donor.model.model.layers[3].self_attn.q_proj.weight.mul_(-1.0)
    patched = toys.logits(two_caches(recipient, donor, toys.EVERY), PROMPTS)
    assert not torch.allclose(patched, toys.logits(plain(donor), PROMPTS), atol=1e-4)


def test_in_one_layer_patching_is_the_donors_vector_on_those_columns() -> None:
    recipient, donor = toys.twins(planted={1: toys.PLANTED[1]})
    chosen = toys.PLANTED[1][:2]
    patched = toys.logits(two_caches(recipient, donor, toys.sites({1: chosen})), PROMPTS)
    assert torch.equal(patched, toys.logits(plain(_sparse(donor, {1: chosen})), PROMPTS))


def test_over_several_layers_patching_is_more_than_the_donors_vector() -> None:
    recipient, donor = toys.twins()
    chosen = {layer: units[:2] for layer, units in toys.PLANTED.items()}
    patched = toys.logits(two_caches(recipient, donor, toys.sites(chosen)), PROMPTS)
    assert not torch.allclose(patched, toys.logits(plain(_sparse(donor, chosen)), PROMPTS), atol=1e-4)


def _sparse(donor: Twin, units: dict[int, list[int]]) -> Twin:
    """The donor's vector on ``units``, 1 elsewhere."""
    factors = {}
    for layer, chosen in units.items():
        factors[layer] = torch.ones_like(donor.vector[layer])
        factors[layer][chosen] = donor.vector[layer][chosen]
    return Twin(donor.model, factors)


@pytest.mark.parametrize("kind", toys.KINDS)
@pytest.mark.parametrize("make", [two_caches, one_batch])
def test_cached_patching_is_what_computing_every_step_afresh_gives(make: Make, kind: str) -> None:
    recipient, donor = toys.twins(kind, dtype=torch.float32)
    # Half of the planted units and some others: neither model, so that a cache of the wrong one shows.
    units = toys.sites({0: [1], 1: [3, 20], 2: [9, 31], 3: [7]})
    for prompt in PROMPTS[:2]:
        cached = toys.logits(make(recipient, donor, units), [prompt])[:, 0]
        afresh = torch.stack(
            [_afresh(recipient, donor, units, (*prompt, *range(10, 10 + n))) for n in range(4)]
        )
        # Of the largest logit: Gemma's are ten times Llama's.
        torch.testing.assert_close(cached, afresh, atol=1e-5 * float(afresh.abs().max()), rtol=0)
        assert torch.equal(cached.argmax(-1), afresh.argmax(-1))


def _afresh(recipient: Twin, donor: Twin, units: Units, tokens: tuple[int, ...]) -> torch.Tensor:
    """Logits after a text, patched at every position, without any cache."""
    given = toys.activations(donor, tokens)

    def give(number: int, seen: torch.Tensor) -> torch.Tensor:
        changed = seen.clone()
        chosen = list(units[number].units)
        changed[0, :, chosen] = given[units[number].layer][:, chosen]
        return changed

    with torch.inference_mode(), at_inputs(recipient.model, [(s.layer, "mlp") for s in units], give):
        last: torch.Tensor = recipient.model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return last


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_twins_in_one_batch_answer_as_two_models_do(kind: str) -> None:
    recipient, donor = toys.twins(kind)
    # The recipient has a vector of its own, as tuned from the same base.
    recipient = Twin(recipient.model, toys.vector({0: [2], 1: [3, 8]}, seed=5))
    units = (
        *toys.sites({1: [3, 20], 2: [9, 31]}),
        Site(layer=3, kind="attention", units=(1,)),
    )
    together, apart = (
        toys.logits(make(recipient, donor, units), PROMPTS) for make in (one_batch, two_caches)
    )
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)

    def answers(make: Make) -> Any:
        return generate(lambda: make(recipient, donor, units), recipient.model, PROMPTS, new_tokens=8)

    assert answers(one_batch) == answers(two_caches)


def test_twins_of_one_model_share_a_batch_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    for apart in (False, True):
        recipient, donor = toys.twins(apart=apart)
        handle = recipient.model.model.register_forward_pre_hook(
            lambda _m, _a, given: rows.append(len(given["input_ids"])), with_kwargs=True
        )
        dap_generate(recipient, donor, toys.EVERY, PROMPTS[:2], new_tokens=1)
        handle.remove()
    assert rows == [4, 2]


def test_heads_are_patched_like_neurons() -> None:
    recipient, donor = toys.twins(apart=True)
    with torch.no_grad():
        donor.model.model.layers[2].self_attn.v_proj.weight.mul_(-2.0)
    donor = Twin(donor.model)
    heads = tuple(range(4))
    patched = toys.logits(
        two_caches(recipient, donor, (Site(layer=2, kind="attention", units=heads),)), PROMPTS
    )
    assert torch.equal(patched, toys.logits(plain(donor), PROMPTS))
    some = toys.logits(
        two_caches(recipient, donor, (Site(layer=2, kind="attention", units=heads[:2]),)), PROMPTS
    )
    assert not torch.allclose(some, patched, atol=1e-4)


def test_batches_and_padding_change_no_answer() -> None:
    recipient, donor = toys.twins()
    units = toys.sites({1: [3, 20], 2: [9, 31]})
    together = dap_generate(recipient, donor, units, PROMPTS, new_tokens=6)
    alone = [dap_generate(recipient, donor, units, [p], new_tokens=6)[0] for p in PROMPTS]
    assert together == alone
    assert dap_generate(recipient, donor, units, PROMPTS, new_tokens=6, batch_tokens=40) == together


def test_positions_are_counted_from_the_first_real_token() -> None:
    recipient, _ = toys.twins()
    seen: list[torch.Tensor] = []
    handle = recipient.model.model.register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["position_ids"]), with_kwargs=True
    )
    greedy(recipient, [(5, 6, 7, 8), (5, 6)], new_tokens=2)
    handle.remove()
    # By length: the shorter prompt is the first row.
    assert [positions.tolist() for positions in seen] == [[[0, 0, 0, 1], [0, 1, 2, 3]], [[2], [4]]]


def test_answers_are_those_of_transformers_own_generation() -> None:
    recipient, _ = toys.twins()
    # A token that some answers contain ends them: both must stop before it.
    end = greedy(recipient, PROMPTS, new_tokens=8)[0][3]
    recipient.model.generation_config.eos_token_id = [end]
    for prompt, answer in zip(PROMPTS, greedy(recipient, PROMPTS, new_tokens=8), strict=True):
        produced = recipient.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=8,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert list(answer) == (produced[: produced.index(end)] if end in produced else produced)
    assert len(greedy(recipient, PROMPTS, new_tokens=8)[0]) <= 3


def test_a_folded_donor_is_patched_through_the_recipients_value_vectors() -> None:
    base = toys.model()
    recipient, donor = folded_twins(base, toys.fold(base, toys.vector()))
    patched = toys.logits(two_caches(recipient, donor, toys.sites(toys.PLANTED)), PROMPTS)
    torch.testing.assert_close(patched, toys.logits(plain(donor), PROMPTS), atol=1e-5, rtol=1e-5)
    back = toys.logits(two_caches(*swapped(recipient, donor), toys.sites(toys.PLANTED)), PROMPTS)
    torch.testing.assert_close(back, toys.logits(plain(recipient), PROMPTS), atol=1e-5, rtol=1e-5)


def test_hooks_are_gone_afterwards() -> None:
    recipient, donor = toys.twins(apart=True)
    dap_generate(recipient, donor, toys.EVERY, PROMPTS, new_tokens=2)
    for twin in (recipient, donor):
        assert not any(module._forward_pre_hooks for module in twin.model.modules())


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "message"),
    [
        ([], 4, "there are no prompts"),
        ([(5, 6), ()], 4, "holds no token"),
        ([(5,) * 250], 8, "exceed the context of 256"),
    ],
)
def test_prompts_that_cannot_be_answered_are_an_error(prompts: Any, new_tokens: int, message: str) -> None:
    recipient, donor = toys.twins()
    with pytest.raises(LocateError, match=message):
        dap_generate(recipient, donor, toys.EVERY, prompts, new_tokens=new_tokens)


def test_logits_that_are_no_numbers_are_an_error_and_not_an_answer() -> None:
    recipient, donor = toys.twins()
    with torch.no_grad():
        recipient.model.lm_head.weight[7, 0] = torch.nan
    with pytest.raises(LocateError, match="logits are not numbers"):
        dap_generate(recipient, donor, toys.EVERY, PROMPTS, new_tokens=2)


def test_twins_of_another_shape_are_an_error() -> None:
    recipient = Twin(toys.model())
    with pytest.raises(LocateError, match="differ in shape"):
        dap_generate(recipient, Twin(worlds.model(dtype=torch.float64)), toys.EVERY, PROMPTS)
    with pytest.raises(LocateError, match=r"donor's vector of layer 1 has shape \[7\]"):
        dap_generate(recipient, Twin(recipient.model, {1: torch.ones(7)}), toys.EVERY, PROMPTS)
    with pytest.raises(LocateError, match="only a donor can be folded"):
        dap_generate(Twin(recipient.model, folded={1: torch.ones(48)}), recipient, toys.EVERY, PROMPTS)


def test_a_donor_whose_value_vector_is_zero_cannot_be_a_recipient() -> None:
    base = toys.model()
    twins = folded_twins(base, toys.fold(base, {1: torch.zeros(toys.WIDTH, dtype=torch.float64)}))
    with pytest.raises(LocateError, match="is zero"):
        swapped(*twins)


def test_selected_units_become_sites() -> None:
    shape = shape_of(toys.model().config)
    chosen = toys.unit_set("mlp", (toys.LAYERS, toys.WIDTH), [(1, 3), (1, 40), (2, 5)])
    assert units_of(chosen, shape) == toys.sites({1: [3, 40], 2: [5]})
    heads = toys.unit_set("attention", (toys.LAYERS, 4), [(3, 2)])
    assert units_of(heads, shape) == (Site(layer=3, kind="attention", units=(2,)),)


def test_units_that_cannot_be_patched_are_an_error() -> None:
    shape = shape_of(toys.model().config)
    with pytest.raises(LocateError, match="'query' cannot be patched"):
        units_of(toys.unit_set("query", (toys.LAYERS, 32), [(0, 1)]), shape)
    with pytest.raises(LocateError, match="unit 40 of layer 1 does not exist"):
        units_of(toys.unit_set("mlp", (toys.LAYERS, toys.WIDTH), [(1, 40)]), shape._replace(mlp_width=40))


def test_a_donor_of_its_own_leaves_the_recipients_model_alone() -> None:
    recipient, donor = toys.twins(apart=True)
    before = copy.deepcopy(recipient.model.state_dict())
    dap_generate(recipient, donor, toys.EVERY, PROMPTS, new_tokens=3)
    assert all(torch.equal(before[name], now) for name, now in recipient.model.state_dict().items())
