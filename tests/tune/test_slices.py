from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from guard.tune.errors import TuneError
from guard.tune.slices import freezing_units, training_units
from tests.locate import importance_toys as toys

UNITS: dict[Any, Any] = {
    "mlp": {0: [3, 17], 1: [5]},
    "query": {1: [0, 23]},
    "key": {0: [7]},
    "value": {1: [2, 11]},
}
ROWS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def chosen(model: Any, *, gate: bool) -> dict[str, Tensor]:
    """Which entries of each weight belong to ``UNITS``."""
    masks = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in model.state_dict().items()}
    for component, by_layer in UNITS.items():
        for layer, units in by_layer.items():
            here = f"model.layers.{layer}."
            if component == "mlp":
                masks[f"{here}mlp.up_proj.weight"][units] = True
                masks[f"{here}mlp.down_proj.weight"][:, units] = True
                if gate:
                    masks[f"{here}mlp.gate_proj.weight"][units] = True
            else:
                masks[f"{here}self_attn.{ROWS[component]}.weight"][units] = True
    return masks


def train(model: Any, parameters: list[Any], weight_decay: float) -> tuple[float, float]:
    """Loss before and after some steps."""
    optimiser = torch.optim.AdamW(parameters, lr=0.01, weight_decay=weight_decay)
    ids = torch.tensor([[5, 9, 2, 14, 3, 8], [7, 7, 4, 1, 2, 3]])
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimiser.step()
    return losses[0], losses[-1]


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_only_the_units_change_and_the_loss_falls(weight_decay: float) -> None:
    model = toys.model()
    before, masks = weights(model), chosen(model, gate=False)
    with training_units(model, UNITS) as parameters:
        # Two columns' and two rows' worth of numbers, and so on: nothing else has a gradient or a moment.
        assert sum(p.numel() for p in parameters) == sum(int(mask.sum()) for mask in masks.values())
        first, last = train(model, parameters, weight_decay)
    assert last < first
    after = weights(model)
    assert after.keys() == before.keys()
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask])
        assert (after[name][mask] != before[name][mask]).all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_frozen_units_stay_to_the_bit_while_the_rest_trains(weight_decay: float) -> None:
    model = toys.model()
    before, masks = weights(model), chosen(model, gate=True)
    with freezing_units(model, UNITS) as parameters:
        first, last = train(model, parameters, weight_decay)
    assert last < first
    after = weights(model)
    for name, mask in masks.items():
        assert torch.equal(after[name][mask], before[name][mask])
        changed = after[name] != before[name]
        # A bias would move the frozen rows' outputs, so that of a weight with frozen rows stays.
        rows = name.endswith("proj.bias") and "down" not in name
        still = rows and masks[name.removesuffix("bias") + "weight"].any()
        assert changed.any() != still


def test_what_was_learnt_is_in_the_model_behind_the_block() -> None:
    model = toys.model()
    ids = torch.tensor(toys.PROMPTS[:1])
    with training_units(model, UNITS) as parameters:
        train(model, parameters, 0.0)
        inside = model(input_ids=ids).logits.detach()
    assert torch.equal(model(input_ids=ids).logits, inside)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_head_brings_the_keys_and_values_of_its_group() -> None:
    # Head 2 of 4, on 2 key heads: group 1 is 2 // 2, and not 2 % 2.
    model = toys.model()
    before = weights(model)
    with training_units(model, {"attention": {0: [2]}}) as parameters:
        train(model, parameters, 0.0)
    changed = {name: value != before[name] for name, value in weights(model).items()}
    here = "model.layers.0.self_attn."
    assert changed[f"{here}q_proj.weight"].any(1).nonzero().flatten().tolist() == list(range(12, 18))
    assert changed[f"{here}o_proj.weight"].any(0).nonzero().flatten().tolist() == list(range(12, 18))
    for name in ("k_proj", "v_proj"):
        assert changed[f"{here}{name}.weight"].any(1).nonzero().flatten().tolist() == list(range(6, 12))


def test_a_channel_brings_its_value_row() -> None:
    model = toys.model()
    before = weights(model)
    with training_units(model, {"channel": {1: [14]}}) as parameters:
        train(model, parameters, 0.0)
    changed = {name: value != before[name] for name, value in weights(model).items()}
    assert changed["model.layers.1.self_attn.v_proj.weight"].any(1).nonzero().flatten().tolist() == [8]
    assert changed["model.layers.1.self_attn.o_proj.weight"].any(0).nonzero().flatten().tolist() == [14]


def test_an_error_in_the_block_leaves_an_ordinary_model() -> None:
    model = toys.model()
    with pytest.raises(KeyError), training_units(model, UNITS):
        raise KeyError
    assert weights(model).keys() == weights(toys.model()).keys()


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({}, "no unit"),
        ({"mlp": {0: [20]}}, "20 rows"),
        ({"mlp": {0: []}}, "no unit"),
        ({"key": {0: [-1]}}, "12"),
    ],
)
def test_units_that_do_not_exist_are_refused(units: Any, message: str) -> None:
    with pytest.raises(TuneError, match=message), training_units(toys.model(), units):
        pass
