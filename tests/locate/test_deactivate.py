from __future__ import annotations

from typing import Any

import pytest
import torch

from guard.locate.deactivate import deactivated
from guard.locate.errors import LocateError
from tests.locate import importance_toys as toys

IDS = torch.tensor(toys.PROMPTS[:1])


@pytest.mark.parametrize(
    ("component", "module", "where"),
    [
        ("mlp", "mlp.down_proj", (slice(None), [3, 5])),
        ("query", "self_attn.q_proj", ([3, 5], slice(None))),
        ("key", "self_attn.k_proj", ([3, 5], slice(None))),
        ("value", "self_attn.v_proj", ([3, 5], slice(None))),
        ("channel", "self_attn.o_proj", (slice(None), [3, 5])),
        ("attention", "self_attn.o_proj", (slice(None), [*range(18, 24), *range(6, 12)])),
    ],
)
def test_a_unit_switched_off_is_a_row_or_column_of_zeros(component: Any, module: str, where: Any) -> None:
    model = toys.model()
    before = model(input_ids=IDS).logits
    with deactivated(model, {component: {1: [3, 5] if component != "attention" else [3, 1]}}):
        found = model(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, before)
    layer = model.model.layers[1].get_submodule(module)
    layer.weight[where] = 0
    if where[1] == slice(None):
        layer.bias[where[0]] = 0
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, model(input_ids=IDS).logits, atol=1e-12, rtol=1e-12)


def test_units_of_several_components_are_off_together() -> None:
    model = toys.model()
    units: Any = {"mlp": {0: [1], 1: [2]}, "query": {0: [4]}}
    with deactivated(model, units):
        together = model(input_ids=IDS).logits
    with deactivated(model, {"mlp": units["mlp"]}), deactivated(model, {"query": units["query"]}):
        nested = model(input_ids=IDS).logits
    assert torch.equal(together, nested)


@pytest.mark.parametrize(
    "units",
    [{"mlp": {0: [20]}}, {"query": {0: [24]}}, {"key": {1: [-1]}}, {"value": {0: []}}, {"key": {2: [0]}}],
)
def test_units_that_do_not_exist_are_refused(units: Any) -> None:
    with pytest.raises(LocateError), deactivated(toys.model(), units):
        pass
