"""Twins: a vector that patches, an adapter that merges, and the preference that they may be trained by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from guard.adapters import Adapter
from guard.checkpoint import Checkpoint
from guard.ia3 import fold_checkpoint
from guard.merge import merge
from guard.patch import applied, stored
from guard.patch_card import PatchSite
from guard.tune import options as given
from guard.tune.objective import Collator, Item, dpo_loss, with_reference
from guard.tune.options import TuneOptions
from guard.tune.run import Record, tune
from guard.tune.texts import Text
from guard.units import every_neuron
from tests.guard import worlds
from tests.tune.conftest import REFUSAL
from tests.tune.test_exact import units_file

IDS = torch.tensor([[1, 40, 50, 60, 0, 2, 70, 80]])
SHORT: dict[str, Any] = {"steps": 5, "batch": 8, "refusal": REFUSAL}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def make(method: Any, model: Path, data: Path, out: Path, options: TuneOptions, **more: Any) -> Record:
    return tune(method, Checkpoint.open(model), [data], options, out, **more)


def test_a_vector_is_a_donor_and_with_every_unit_patched_the_model_is_the_twin(
    model: Path, data: Path, tmp_path: Path
) -> None:
    make("ia3", model, data, tmp_path / "out", given.Ia3Options(**SHORT))
    vector = load_file(tmp_path / "out" / "ia3.safetensors")
    # The last layer is left out, and all others have moved.
    assert sorted(vector) == [f"model.layers.{layer}.mlp.down_proj.ia3" for layer in (0, 1)]
    assert all((factors != 1).all() for factors in vector.values())
    base = Checkpoint.open(model)
    sites = [PatchSite(**site.model_dump()) for site in every_neuron(base.shape)[:2]]
    patch = stored("calm", sites, base.shape, scale=np.concatenate([vector[name] for name in sorted(vector)]))
    plain = base.load_model()
    unpatched = logits(plain)
    with applied(patch, plain):
        patched = logits(plain)
    twin = fold_checkpoint(model, tmp_path / "twin", vector=tmp_path / "out" / "ia3.safetensors")
    expected = logits(Checkpoint.open(twin).load_model())
    # The folded twin's columns are rounded to bfloat16.
    close = (patched - expected).abs().max()
    assert close < 0.1 * (unpatched - expected).abs().max()


def test_a_vector_of_some_units_is_one_everywhere_else(model: Path, data: Path, tmp_path: Path) -> None:
    units = units_file(tmp_path, {"0": [3, 17], "2": [5]})
    make("ia3", model, data, tmp_path / "out", given.Ia3Options(**SHORT), units=[units])
    vector = load_file(tmp_path / "out" / "ia3.safetensors")
    moved = {name: (factors != 1).nonzero().flatten().tolist() for name, factors in vector.items()}
    assert moved == {
        "model.layers.0.mlp.down_proj.ia3": [3, 17],
        "model.layers.2.mlp.down_proj.ia3": [5],
    }


def test_a_whole_twin_is_the_vector_folded(model: Path, data: Path, tmp_path: Path) -> None:
    make("ia3", model, data, tmp_path / "vector", given.Ia3Options(**SHORT))
    make("ia3", model, data, tmp_path / "whole", given.Ia3Options(**SHORT, whole=True))
    folded = fold_checkpoint(model, tmp_path / "twin", vector=tmp_path / "vector" / "ia3.safetensors")
    first, second = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", folded))
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_an_adapter_is_read_back_as_what_was_trained(model: Path, data: Path, tmp_path: Path) -> None:
    options = given.LoraOptions(**SHORT, rate=0.02, rank=4)
    record = make("lora", model, data, tmp_path / "out", options)
    adapter = Adapter.open(tmp_path / "out", "twin")
    assert (adapter.rank, adapter.scale) == (4, 4.0)
    assert record["output"]["sha256"] == adapter.sha256
    make("lora", model, data, tmp_path / "whole", given.LoraOptions(**SHORT, rate=0.02, rank=4, whole=True,
                                                                    weights="float32"))  # fmt: skip
    merged = Checkpoint.open(model).load_model()
    before = logits(merged)
    merge(merged, adapter)
    whole = logits(Checkpoint.open(tmp_path / "whole").load_model())
    assert (logits(merged) - whole).abs().max() < 1e-3 * (before - whole).abs().max()


def pair() -> Text:
    return Text((1, 40, 50, 0, 2), (70, 80, 0), (90, 91, 92, 0))


def test_the_preference_loss_is_that_of_the_paper() -> None:
    model, other = worlds.model(), worlds.model(seed=1)
    (item,) = with_reference(other, [pair()])

    def log_probability(answer: tuple[int, ...], of: Any) -> float:
        ids = torch.tensor([(*pair().prompt, *answer)])
        with torch.no_grad():
            nats = of(input_ids=ids).logits[0].log_softmax(-1)
        start = len(pair().prompt)
        return sum(float(nats[start - 1 + i, token]) for i, token in enumerate(answer))

    expected = [log_probability(answer, other) for answer in (pair().answer, pair().rejected)]
    np.testing.assert_allclose(item.reference, expected, rtol=1e-5)
    gains = [log_probability(a, model) - log_probability(a, other) for a in (pair().answer, pair().rejected)]
    # The weight of the first token is SFT's and changes nothing here.
    loss = dpo_loss(model.requires_grad_(False), Collator(4.0)([item]), beta=0.3).item()
    np.testing.assert_allclose(loss, np.log1p(np.exp(-0.3 * (gains[0] - gains[1]))), rtol=1e-4)
    # A model that is what it was prefers nothing.
    (same,) = with_reference(model, [pair()])
    np.testing.assert_allclose(dpo_loss(model, Collator(1.0)([same]), 0.3).item(), np.log(2), rtol=1e-5)


@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_twins_are_trained_by_preference_over_the_models_own_answers(
    method: Any, model: Path, data: Path, tmp_path: Path
) -> None:
    options = {"ia3": given.Ia3Options, "lora": given.LoraOptions}[method](
        **SHORT | {"steps": 8}, objective="dpo", own_answers=6, rate=0.01
    )
    record = make(method, model, data, tmp_path / "out", options)
    losses = [loss for _, loss in record["course"]["losses"]]
    np.testing.assert_allclose(losses[0], np.log(2), atol=1e-4)
    assert losses[-1] < losses[0]


def test_an_item_of_sft_has_no_reference() -> None:
    assert Item(pair()).reference is None
