from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from guard.cache import Cache
from guard.checkpoint import Checkpoint
from guard.data import load
from guard.locate import importance
from guard.locate.errors import LocateError
from guard.locate.importance import ImportanceOptions, locate, run, tally
from guard.locate.passes import Kept
from guard.locate.unit_set import UnitSet
from tests.guard import worlds
from tests.locate import importance_toys as toys

ALONE = ImportanceOptions(foundation=False)
GENERAL = [(3, 5, 8), (1, 2, 4, 6), (9, 10)]


def switches() -> Any:
    """One layer: neuron 0 is on for every token, 1 for token 7 alone, 2 for token 9; the others are dead."""
    model = toys.model(num_hidden_layers=1, mlp_bias=False)
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.self_attn.o_proj.bias.zero_()
    embed = model.model.embed_tokens.weight
    embed.zero_()
    embed[:, 0] = 1
    embed[7, 1] = 1
    embed[9, 2] = 1
    for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
        weight.zero_()
    layer.mlp.gate_proj.weight[:, 0] = 1
    for unit in range(3):
        layer.mlp.up_proj.weight[unit, unit] = 1
    return model


NEURONS = {"matrices": ("mlp",), "mlp_active": 0.15}
"""Three of twenty neurons may be active for a prompt."""


def neurons(
    prompts: list[tuple[int, ...]], foundation: Sequence[tuple[int, ...]] = (), **options: Any
) -> list[int]:
    chosen = ImportanceOptions(**{**NEURONS, "foundation": bool(foundation), **options})
    found = locate(switches(), prompts, chosen, foundation=foundation)
    return np.flatnonzero(found.selected["mlp"][0]).tolist()


HALF = [(1, 7, 2), (3, 4, 5), (7, 7), (6, 2)]
"""Token 7 is in half of them."""


def test_a_unit_is_selected_that_is_active_for_enough_prompts() -> None:
    assert neurons(HALF) == [0]
    assert neurons(HALF, consistency=0.5) == [0, 1]
    assert neurons(HALF, consistency=0.51) == [0]


def test_units_that_general_text_needs_are_left_out() -> None:
    everywhere = [(7, 9), (9, 1, 7)]
    assert neurons(everywhere) == [0, 1, 2]
    assert neurons(everywhere, foundation=[(1, 2), (9, 3)]) == [1, 2]
    assert neurons(everywhere, foundation=[(9, 2), (9, 3)]) == [1]


def test_a_unit_without_effect_is_never_active() -> None:
    assert neurons(HALF, mlp_active=1.0) == [0]


@pytest.mark.parametrize(
    ("prompts", "share", "wanted"), [(100, 0.07, 7), (10, 0.1, 1), (3, 1.0, 3), (7, 0.5, 4)]
)
def test_the_share_of_prompts_is_rounded_up(prompts: int, share: float, wanted: int) -> None:
    counts = np.arange(prompts + 1, dtype=float)[None]
    chosen = importance.Tally(prompts, {"mlp": counts}, {"mlp": counts}).consistent(share)["mlp"]
    assert np.flatnonzero(chosen)[0] == wanted


@pytest.mark.parametrize(("scope", "per_layer"), [("layer", [2, 2]), ("model", None)])
def test_the_most_important_units_of_a_prompt_are_active(scope: str, per_layer: list[int] | None) -> None:
    model = toys.model()
    options = ImportanceOptions(mlp_active=0.1, attention_active=0.25, scope=scope, foundation=False)
    counted = tally(model, toys.PROMPTS[:1], options)
    assert [int(counted.active[name].sum()) for name in ("mlp", "query", "key", "value")] == [4, 12, 6, 6]
    active, mean = counted.active["mlp"], counted.mean["mlp"]
    if per_layer is None:
        assert mean[active == 1].min() > mean[active == 0].max()
    else:
        assert active.sum(1).tolist() == per_layer
        for number in range(2):
            assert mean[number][active[number] == 1].min() > mean[number][active[number] == 0].max()


def test_scores_follow_the_share_of_prompts_and_then_the_importance() -> None:
    found = locate(toys.model(), toys.PROMPTS, ImportanceOptions(foundation=False, consistency=0.5))
    assert found.scores.keys() == {"mlp", "query", "key", "value"}
    for name, scores in found.scores.items():
        share, mean = found.extra[f"active.{name}"], found.extra[f"importance.{name}"]
        expected = sorted(np.ndindex(scores.shape), key=lambda at: (share[at], mean[at]))
        assert sorted(np.ndindex(scores.shape), key=lambda at: scores[at]) == expected
        assert (scores[found.selected[name]] >= 0.5).all()


@pytest.mark.parametrize("consistency", [0.5, 1.0])
def test_units_that_general_text_needs_are_no_candidates_and_the_best_of_the_rest_are_selected(
    consistency: float,
) -> None:
    options = ImportanceOptions(consistency=consistency, attention_active=0.3)
    found = locate(toys.model(), toys.PROMPTS, options, foundation=GENERAL)
    for name, scores in found.scores.items():
        common = found.extra[f"foundation.{name}"] >= consistency
        assert (np.isnan(scores) == common).all()
        assert (found.selected[name] == (scores >= consistency)).all()
    assert np.isnan(found.scores["query"]).any()


@pytest.mark.parametrize("tokens", [4, 14, 8192])
def test_results_do_not_depend_on_batches(tokens: int) -> None:
    model = toys.model()
    calls: list[int] = []
    handle = model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = locate(model, toys.PROMPTS, ImportanceOptions(), foundation=GENERAL, batch_tokens=tokens)
    handle.remove()
    whole = locate(model, toys.PROMPTS, ImportanceOptions(), foundation=GENERAL)
    assert found.cost["tokens"] == 17 + 9
    # A cost counts texts, in however many batches they went through.
    assert len(calls) == {4: 7, 14: 3, 8192: 2}[tokens]
    assert found.cost["forward_passes"] == 7
    for name in whole.scores:
        np.testing.assert_allclose(
            found.extra[f"importance.{name}"], whole.extra[f"importance.{name}"], rtol=1e-10, atol=1e-12
        )
        assert (found.selected[name] == whole.selected[name]).all()


def test_prompts_that_do_not_fit_are_left_out() -> None:
    counted = tally(toys.model(), [(5,), toys.PROMPTS[0], (3,) * 65], ALONE)
    assert counted.prompts == 1


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no harmful prompts were given"),
        ([(5,), (3,)], "none of the 2 harmful prompts has from 2 to 64 tokens"),
        ([(3,) * 65], "longer than the model's context of 64 tokens"),
    ],
)
def test_prompts_without_a_usable_one_are_refused(prompts: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(LocateError, match=message):
        locate(toys.model(), prompts, ALONE)


def test_benign_prompts_are_needed_for_the_foundation() -> None:
    with pytest.raises(LocateError, match="no benign prompts"):
        locate(toys.model(), toys.PROMPTS, ImportanceOptions())


def test_activations_that_are_no_numbers_are_refused() -> None:
    model = toys.model()
    model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(LocateError, match="mlp at layer 1 is not a finite number"):
        locate(model, toys.PROMPTS, ALONE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrices": ()}, "matrices"),
        ({"matrices": ("gate",)}, "matrices"),
        ({"matrices": ("mlp", "mlp")}, "matrices"),
        ({"variant": "paper"}, "variant"),
        ({"scope": "head"}, "scope"),
        ({"mlp_active": 0.0}, "mlp_active"),
        ({"attention_active": 1.1}, "attention_active"),
        ({"consistency": float("nan")}, "consistency"),
        ({"variant": "released", "effect": "output"}, "released"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LocateError, match=message):
        ImportanceOptions(**options)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.observe._CHUNK", 1)
    prompts = [*toys.PROMPTS, (4, 4, 4), (8, 2)]
    kept = Kept(Cache(tmp_path), weights="w")
    model, real, passes = toys.model(), importance.forward, []

    def twice(*arguments: Any) -> None:
        if len(passes) == 2:
            raise KeyboardInterrupt
        passes.append(arguments)
        real(*arguments)

    monkeypatch.setattr(importance, "forward", twice)
    with pytest.raises(KeyboardInterrupt):
        tally(model, prompts, ALONE, kept=kept)
    monkeypatch.setattr(importance, "forward", real)
    resumed = locate(model, prompts, ALONE, kept=kept)
    assert resumed.cost["forward_passes"] == 4
    again = locate(model, prompts, ImportanceOptions(foundation=False, consistency=0.5), kept=kept)
    assert again.cost["forward_passes"] == 0
    other = locate(model, prompts, ImportanceOptions(foundation=False, mlp_active=0.5), kept=kept)
    assert other.cost["forward_passes"] == 6
    for name, values in locate(model, prompts, ALONE).scores.items():
        np.testing.assert_array_equal(resumed.scores[name], values)


def test_a_run_makes_a_unit_set_with_its_provenance(tmp_path: Path) -> None:
    path = worlds.checkpoint(tmp_path / "model", worlds.model())
    rows = [
        {"prompt": text, "label": "benign" if number % 2 else "harmful"}
        for number, text in enumerate(worlds.texts(8, seed=0))
    ]
    dataset = load("fit", [worlds.write_rows(tmp_path / "data.jsonl", rows)])
    checkpoint = Checkpoint.open(path, "toy")
    options, statistics = ImportanceOptions(consistency=0.75), tmp_path / "statistics.safetensors"
    made = run(checkpoint, dataset, options, seed=3, cache=Cache(tmp_path / "cache"), statistics=statistics)
    kept = load_file(statistics)
    assert kept.keys() == {
        f"{part}.{name}" for part in ("active", "importance", "foundation") for name in made.scores
    }
    assert ((kept["active.mlp"] >= 0.75)[made.selected["mlp"]]).all()
    saved = UnitSet.load(made.save(tmp_path / "units"))
    provenance = saved.provenance
    assert (provenance.method, provenance.seed, provenance.model) == ("importance", 3, checkpoint.card())
    assert provenance.data == dataset.files
    assert provenance.options["consistency"] == 0.75
    assert provenance.cost["forward_passes"] == 8
    assert (
        json.loads((tmp_path / "units" / "units.json").read_text())["selected"].keys() == saved.scores.keys()
    )
    assert {name: scores.shape for name, scores in saved.scores.items()} == {
        "mlp": (3, 48),
        "query": (3, 32),
        "key": (3, 16),
        "value": (3, 16),
    }
    assert len(saved) > 0
