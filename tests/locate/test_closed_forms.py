"""Each closed form is the change that switching one row or column off makes, unit by unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from guard.locate import closed_forms
from guard.locate.deactivate import deactivated
from guard.locate.importance_options import ImportanceOptions, Matrix
from guard.locate.importance_reader import reading, widths
from guard.locate.passes import Cost, forward
from tests.locate import importance_toys as toys

EXACT = {"atol": 1e-12, "rtol": 1e-12}
PROJECTION = {"query": "q", "key": "k", "value": "v"}


def read(model: Any, prompts: list[tuple[int, ...]] = toys.PROMPTS, **options: Any) -> dict[Matrix, Tensor]:
    chosen = ImportanceOptions(**options)
    with reading(model, [len(p) for p in prompts], widths(model, chosen), chosen) as seen:
        forward(model, prompts, Cost())
    return seen.importance


def layers(model: Any) -> list[tuple[int, int, toys.Layer]]:
    """Every prompt and layer."""
    return [
        (row, number, toys.Layer(model, number, prompt))
        for row, prompt in enumerate(toys.PROMPTS)
        for number in range(len(model.model.layers))
    ]


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_importance_of_every_unit_equals_the_layer_run_without_it(family: str) -> None:
    model = toys.model(family)
    found = read(model)
    for row, number, layer in layers(model):
        for name in ("query", "key"):
            expected = toys.change(layer, PROJECTION[name], found[name].shape[-1], part=1)
            torch.testing.assert_close(found[name][row, number], expected, **EXACT, msg=f"{name} {number}")
        expected = toys.change(layer, "v", found["value"].shape[-1], part=0)
        torch.testing.assert_close(found["value"][row, number], expected, **EXACT)
        for name in ("up", "down"):
            expected = toys.change(layer, name, found["mlp"].shape[-1], part=2)
            torch.testing.assert_close(found["mlp"][row, number], expected, **EXACT)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_change_of_the_output_equals_the_layer_run_without_the_unit(family: str) -> None:
    model = toys.model(family)
    found = read(model, effect="output", matrices=("query", "key"))
    for row, number, layer in layers(model):
        for name in ("query", "key"):
            expected = toys.change(layer, PROJECTION[name], found[name].shape[-1], part=0)
            # Roots of sums that cancel: 1e-16 of a square is 1e-8 of a root.
            torch.testing.assert_close(found[name][row, number], expected, atol=1e-7, rtol=1e-9)


def test_last_row_alone_is_the_change_at_the_last_token() -> None:
    model = toys.model()
    found = read(model, query_rows="last", matrices=("query", "key"))
    for row, number, layer in layers(model):
        before = layer.outputs()[1][..., -1, :]
        for name in ("query", "key"):
            for unit in range(found[name].shape[-1]):
                after = layer.without(PROJECTION[name], unit)[1][..., -1, :]
                assert found[name][row, number, unit] == pytest.approx(
                    float((after - before).norm()), abs=1e-12
                )


@pytest.mark.parametrize("largest", [1, 40, 300, 5000])
def test_results_do_not_depend_on_the_size_of_blocks(largest: int) -> None:
    attention, values, weight = random_attention()
    for side in ("query", "key"):
        whole = closed_forms.map_importance(attention, side)
        torch.testing.assert_close(
            closed_forms.map_importance(attention, side, largest=largest), whole, **EXACT
        )
        whole = closed_forms.output_importance(attention, side, values, weight)
        parts = closed_forms.output_importance(attention, side, values, weight, largest=largest)
        torch.testing.assert_close(parts, whole, **EXACT)


def random_attention() -> tuple[closed_forms.Attention, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    angle = normal(5, 3).repeat(1, 2)
    attention = closed_forms.Attention(normal(5, 4, 6), normal(5, 2, 6), angle.cos(), angle.sin(), 0.4)
    return attention, normal(5, 2, 6), normal(16, 24)


def test_rotated_product_is_not_the_removal_of_a_row() -> None:
    attention, _, _ = random_attention()
    exact = closed_forms.map_importance(attention, "query")
    # The released form with its scale put right and its root taken: what is left is rotation.
    scaled = attention._replace(query=attention.query * attention.scaling, scaling=1.0)
    shortcut = closed_forms.released_importance(scaled).sqrt()
    assert not torch.allclose(exact, shortcut, rtol=0.05)
    still = attention._replace(cos=torch.ones_like(attention.cos), sin=torch.zeros_like(attention.sin))
    shortcut = closed_forms.released_importance(still._replace(query=still.query * 0.4, scaling=1.0)).sqrt()
    torch.testing.assert_close(closed_forms.map_importance(still, "query"), shortcut, **EXACT)


def test_released_variant_differs_and_is_what_the_authors_compute() -> None:
    model = toys.model()
    exact, released = read(model), read(model, variant="released")
    for name in exact:
        assert exact[name].shape == released[name].shape
        assert not torch.allclose(exact[name], released[name], rtol=0.05)
    for row, number, layer in layers(model):
        up = layer.mlp.up_proj(layer.seen["mlp"])[0]
        torch.testing.assert_close(released["mlp"][row, number], up.abs().sum(0), **EXACT)
        kept: list[Tensor] = []
        layer.attention.o_proj.register_forward_pre_hook(lambda _m, inputs, kept=kept: kept.append(inputs[0]))
        layer.outputs()
        by_head = kept[0][0].abs().sum(0).view(2, 2, 6)
        torch.testing.assert_close(released["value"][row, number], by_head.amax(1).flatten(), **EXACT)
        torch.testing.assert_close(
            released["key"][row, number],
            released["query"][row, number].view(2, 2, 6).amax(1).flatten(),
            **EXACT,
        )


def test_a_column_of_zeros_has_no_importance_and_a_longer_one_has_more() -> None:
    model = toys.model()
    before = read(model, matrices=("mlp",))["mlp"][:, 1]
    down = model.model.layers[1].mlp.down_proj.weight
    down[:, 3] = 0
    down[:, 4] *= 8
    down[:, 5] *= 10
    after = read(model, matrices=("mlp",))["mlp"][:, 1]
    assert torch.equal(after[:, 3], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(after[:, 4], 8 * before[:, 4])
    torch.testing.assert_close(after[:, 5], 10 * before[:, 5], rtol=1e-15, atol=0.0)
    assert torch.equal(after[:, 6:], before[:, 6:])


def test_equal_heads_have_equal_scores() -> None:
    model = toys.model(num_hidden_layers=1)
    query = model.model.layers[0].self_attn.q_proj
    query.weight[6:12], query.bias[6:12] = query.weight[:6], query.bias[:6]
    found = read(model, matrices=("query",))["query"]
    torch.testing.assert_close(found[..., 6:12], found[..., :6], **EXACT)
    assert not torch.allclose(found[..., 12:18], found[..., :6])


@pytest.mark.parametrize("component", ["key", "value"])
def test_a_row_of_keys_or_values_acts_on_the_heads_of_its_group_alone(component: Matrix) -> None:
    model = toys.model()
    seen: list[Tensor] = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _m, inputs: seen.append(inputs[0])
    )
    ids = torch.tensor(toys.PROMPTS[:1])
    model(input_ids=ids)
    for row in range(12):
        with deactivated(model, {component: {0: [row]}}):
            model(input_ids=ids)
        changed = (seen.pop() - seen[0]).view(-1, 4, 6).norm(dim=0)
        heads = (changed > 1e-9).any(-1)
        assert heads.tolist() == [row // 6 == head // 2 for head in range(4)]
        if component == "value":
            assert (changed > 1e-9).any(0).tolist() == [row % 6 == column for column in range(6)]


def test_padded_places_do_not_count() -> None:
    clean = read(toys.model(num_hidden_layers=1))
    model = toys.model(num_hidden_layers=1)
    toys.poison(model, toys.PROMPTS)
    for name, found in read(model).items():
        assert torch.equal(found, clean[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_weights_give_nearly_the_same(dtype: torch.dtype) -> None:
    exact, rounded = read(toys.model()), read(toys.model().to(dtype))
    for name in exact:
        assert rounded[name].dtype == torch.float64
        distance = (rounded[name] - exact[name]).norm() / exact[name].norm()
        assert distance < (0.1 if dtype == torch.bfloat16 else 1e-4)


def test_hooks_change_no_output_and_are_gone_afterwards() -> None:
    model = toys.model()
    ids = torch.tensor(toys.PROMPTS[:1])
    before = model(input_ids=ids).logits
    options = ImportanceOptions()
    with reading(model, [ids.shape[1]], widths(model, options), options):
        during = model(input_ids=ids).logits
    assert torch.equal(before, during)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
