from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from guard.cache import Cache
from guard.checkpoint import Checkpoint
from guard.data import load
from guard.locate import capacity
from guard.locate.capacity import CapacityOptions, importance, locate, run
from guard.locate.capacity_classes import transitions
from guard.locate.capacity_options import KINDS
from guard.locate.errors import LocateError
from guard.locate.moments import Moments
from guard.locate.passes import Kept
from guard.locate.unit_set import UnitSet
from tests.guard import worlds
from tests.locate import importance_toys as toys

CHANNELS = CapacityOptions(attention_unit="channel")
OTHERS = [(4, 4, 9), (12, 3, 2, 2), (8, 1)]
QUARTERS = CapacityOptions(scu_share=0.25, ucu_share=0.25, ru_share=0.25)


def inputs(model: Any, name: str, layer: int, prompts: list[tuple[int, ...]]) -> Tensor:
    """What a linear layer receives for all tokens of all prompts, one prompt at a time: ``[n, width]``."""
    seen: list[Tensor] = []
    module = model.model.layers[layer].get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _module, given: seen.append(given[0][0]))
    for prompt in prompts:
        model(input_ids=torch.tensor([prompt]))
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_importance_is_the_error_that_the_mean_in_place_of_a_channel_makes(family: str) -> None:
    model = toys.model(family)
    found = importance(model, toys.PROMPTS, CHANNELS, batch_tokens=1)
    for component, name in (("mlp", "mlp.down_proj"), ("channel", "self_attn.o_proj")):
        for number, layer in enumerate(model.model.layers):
            x, module = inputs(model, name, number, toys.PROMPTS), layer.get_submodule(name)
            for channel in range(x.shape[1]):
                ablated = x.clone()
                ablated[:, channel] = x[:, channel].mean()
                error = (module(ablated) - module(x)).square().sum() / (len(x) - 1)
                assert found[component][number, channel] == pytest.approx(float(error), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("cuts", [[], [1], [1, 2, 3], [50], [7, 8, 30, 99]])
def test_streamed_variance_is_that_of_two_passes(cuts: list[int]) -> None:
    random = torch.Generator().manual_seed(0)
    rows = 1e4 + torch.randn(100, 5, generator=random, dtype=torch.float64) * torch.tensor(
        [1e-3, 1, 1, 50, 1e3]
    )
    moments = Moments()
    for part in torch.tensor_split(rows, cuts):
        moments.add(part)
    moments.add(rows[:0])
    assert moments.count == 100
    assert moments.mean is not None
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(moments.variance(), rows.var(0), rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("cuts", [[], [1, 4]])
def test_a_constant_channel_has_no_variance_at_all(cuts: list[int]) -> None:
    rows = torch.full((9, 2), 1234.5678)
    rows[:, 1] = torch.arange(9)
    moments = Moments()
    for part in torch.tensor_split(rows, cuts):
        moments.add(part)
    assert moments.variance()[0] == 0
    assert moments.variance()[1] == pytest.approx(7.5)


@pytest.mark.parametrize("tokens", [4, 14, 8192])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_results_do_not_depend_on_batches(tokens: int, positions: Any) -> None:
    model = toys.model()
    options = CapacityOptions(positions=positions, attention_unit="channel")
    found = importance(model, toys.PROMPTS, options, batch_tokens=tokens)
    for component, name in (("mlp", "mlp.down_proj"), ("channel", "self_attn.o_proj")):
        for number, layer in enumerate(model.model.layers):
            x = [inputs(model, name, number, [prompt]) for prompt in toys.PROMPTS]
            rows = torch.cat(x if positions == "all" else [tokens[-1:] for tokens in x])
            expected = rows.var(0) * layer.get_submodule(name).weight.square().sum(0)
            np.testing.assert_allclose(found[component][number], expected.numpy(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_padded_places_do_not_count(positions: Any) -> None:
    options = CapacityOptions(positions=positions)
    # Shortest first, as batches have them: the poisoned places are those of this order.
    prompts = sorted(toys.PROMPTS, key=len)
    clean = importance(toys.model(num_hidden_layers=1), prompts, options)
    model = toys.model(num_hidden_layers=1)
    toys.poison(model, prompts)
    for name, found in importance(model, prompts, options).items():
        np.testing.assert_array_equal(found, clean[name])


def test_a_head_has_the_mean_of_its_channels() -> None:
    model = toys.model()
    channels = importance(model, toys.PROMPTS, CHANNELS)
    heads = importance(model, toys.PROMPTS, CapacityOptions())
    assert heads.keys() == {"mlp", "attention"}
    np.testing.assert_allclose(heads["attention"], channels["channel"].reshape(2, 4, 6).mean(-1))
    np.testing.assert_array_equal(heads["mlp"], channels["mlp"])


def test_a_mixture_is_divided_where_it_has_sites() -> None:
    found = locate(toys.model("glm4_moe"), toys.PROMPTS, OTHERS, QUARTERS)
    assert np.isnan(found.scores["mlp"][0]).all()
    assert (found.extra["class.mlp"][0] == -1).all()
    assert np.isfinite(found.scores["mlp"][1]).all()
    assert sum(int(mask.sum()) for mask in found.selected.values()) == (20 + 2 * 4) // 4


def planted() -> Any:
    """Neurons 0 to 3 follow a property that matters for safety, for utility, for both, and a constant.

    Tokens 1 and 2 differ in the first, 3 and 4 in the second, and within both pairs in the third.
    """
    model = toys.model(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, intermediate_size=4)
    layer = model.model.layers[0]
    for parameter in layer.parameters():
        parameter.zero_()
    layer.post_attention_layernorm.weight.fill_(1)
    embed = model.model.embed_tokens.weight
    embed.zero_()
    for token, held in {1: (1, 0, 0), 2: (0, 0, 1), 3: (0, 1, 0), 4: (0, 0, 1)}.items():
        for column, value in enumerate(held):
            # Two columns a property, so that all tokens are of one length.
            embed[token, 4 + 2 * column] = value
            embed[token, 5 + 2 * column] = 1 - value
        embed[token, :2] = 1
    layer.mlp.gate_proj.weight[:, 0] = 5
    for unit, (column, size) in enumerate([(4, 1.0), (6, 1.0), (8, 1.0), (1, 1000.0)]):
        layer.mlp.up_proj.weight[unit, column] = size
    layer.mlp.down_proj.weight.fill_(1)
    return model


SAFETY = [(1, 2), (2, 1, 1), (2, 2)]
UTILITY = [(3, 4), (4, 3, 3), (4, 4)]


def test_planted_units_fall_into_their_classes() -> None:
    # Four neurons and one head without any output: a fifth of the units to each class, two to the rest.
    options = CapacityOptions(scu_share=0.2, ucu_share=0.2, ru_share=0.2)
    found = locate(planted(), SAFETY, UTILITY, options)
    assert [KINDS[kind] for kind in found.extra["class.mlp"][0]] == ["scu", "ucu", "cu", "ru"]
    assert found.selected["mlp"].tolist() == [[True, False, False, False]]
    assert found.extra["safety.mlp"][0, [1, 3]].tolist() == [0, 0]
    assert found.extra["utility.mlp"][0, [0, 3]].tolist() == [0, 0]


@pytest.mark.parametrize(("kind", "unit"), [("scu", 0), ("ucu", 1), ("ru", 3)])
def test_the_class_asked_for_is_selected_and_scores_highest(kind: Any, unit: int) -> None:
    options = CapacityOptions(select=kind, scu_share=0.2, ucu_share=0.2, ru_share=0.2)
    found = locate(planted(), SAFETY, UTILITY, options)
    assert np.flatnonzero(found.selected["mlp"][0]).tolist() == [unit]
    assert found.scores["mlp"].argmax() == unit


def test_an_unchanged_model_has_a_diagonal_transition_matrix() -> None:
    found = [locate(toys.model(), toys.PROMPTS, OTHERS, QUARTERS) for _ in range(2)]
    before, after = ({"mlp": each.extra["class.mlp"]} for each in found)
    table = transitions(before, after)
    assert table.sum() == 40
    assert (table == np.diag(np.diag(table))).all()


@pytest.mark.parametrize(
    ("safety", "utility", "message"),
    [
        ([], OTHERS, "no harmful prompts"),
        (OTHERS, [], "no benign prompts"),
        ([(1,) * 65], OTHERS, "longer than the model's context"),
        ([(1,)], OTHERS, "no variance"),
    ],
)
def test_prompts_that_give_no_variance_are_refused(safety: Any, utility: Any, message: str) -> None:
    with pytest.raises(LocateError, match=message):
        locate(toys.model(), safety, utility, CapacityOptions())


def test_activations_that_are_no_numbers_are_refused() -> None:
    model = toys.model()
    model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(LocateError, match="mlp site at layer 1 hold NaN"):
        locate(model, toys.PROMPTS, OTHERS, CapacityOptions())


@pytest.mark.parametrize(
    "options",
    [
        {"select": "esu"},
        {"normalise": "z"},
        {"attention_unit": "row"},
        {"positions": "first"},
        {"scu_share": -0.1},
        {"scu_share": 0.5, "ucu_share": 0.5, "ru_share": 0.1},
        {"ru_share": float("nan")},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LocateError):
        CapacityOptions(**options)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.observe._CHUNK", 1)
    kept = Kept(Cache(tmp_path), weights="w")
    model, real, passes = toys.model(), capacity.forward, []

    def twice(*arguments: Any) -> None:
        if len(passes) == 2:
            raise KeyboardInterrupt
        passes.append(arguments)
        real(*arguments)

    monkeypatch.setattr(capacity, "forward", twice)
    with pytest.raises(KeyboardInterrupt):
        locate(model, toys.PROMPTS, OTHERS, CHANNELS, kept=kept)
    monkeypatch.setattr(capacity, "forward", real)
    resumed = locate(model, toys.PROMPTS, OTHERS, CHANNELS, kept=kept)
    assert resumed.cost["forward_passes"] == 5
    # The same sums serve heads, other classes and other shares, but not other positions.
    assert locate(model, toys.PROMPTS, OTHERS, QUARTERS, kept=kept).cost["forward_passes"] == 0
    last = CapacityOptions(positions="last")
    assert locate(model, toys.PROMPTS, OTHERS, last, kept=kept).cost["forward_passes"] == 7
    fresh = locate(model, toys.PROMPTS, OTHERS, CHANNELS)
    for name, values in fresh.scores.items():
        np.testing.assert_array_equal(resumed.scores[name], values)


def test_a_run_makes_a_unit_set_with_its_provenance(tmp_path: Path) -> None:
    path = worlds.checkpoint(tmp_path / "model", worlds.model())
    rows = [
        {"prompt": text, "label": "benign" if number % 2 else "harmful"}
        for number, text in enumerate(worlds.texts(8, seed=0))
    ]
    dataset = load("fit", [worlds.write_rows(tmp_path / "data.jsonl", rows)])
    checkpoint = Checkpoint.open(path, "toy")
    statistics = tmp_path / "statistics.safetensors"
    made = run(checkpoint, dataset, CapacityOptions(scu_share=0.1), statistics=statistics)
    assert (load_file(statistics)["class.mlp"] == KINDS.index("scu")).tolist() == made.selected[
        "mlp"
    ].tolist()
    draws = [
        run(checkpoint, dataset, CapacityOptions(bootstrap=True), seed=seed).scores for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(draws[0]["mlp"], draws[1]["mlp"])
    assert not np.allclose(draws[0]["mlp"], draws[2]["mlp"])
    assert not np.allclose(draws[0]["mlp"], made.scores["mlp"])
    saved = UnitSet.load(made.save(tmp_path / "units"))
    assert saved.provenance.method == "capacity"
    assert saved.provenance.options["scu_share"] == 0.1
    assert saved.provenance.model == checkpoint.card()
    assert {name: scores.shape for name, scores in saved.scores.items()} == {
        "mlp": (3, 48),
        "attention": (3, 4),
    }
    assert len(saved) == round(0.1 * 3 * 52)
