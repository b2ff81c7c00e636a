"""What a method does not train is the same to the bit in the written checkpoint; what it trains changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from guard.checkpoint import Checkpoint
from guard.tune import options as given
from guard.tune.errors import TuneError
from guard.tune.methods import METHODS, Method, Prepared
from guard.tune.output import compared
from guard.tune.run import tune
from guard.tune.slices import Part
from guard.tune.texts import texts
from tests.tune.conftest import REFUSAL

UNITS = {"mlp": {"0": [3, 17], "2": [5]}, "attention": {"1": [2]}}
WEIGHTS = "model.safetensors"
# Rates that show in bfloat16 after a few steps, decay, and a norm that is clipped.
HARD: dict[str, Any] = {
    "steps": 4,
    "batch": 8,
    "rate": 0.02,
    "weight_decay": 0.5,
    "clip": 0.1,
    "warmup": 0.0,
    "refusal": REFUSAL,
}


def units_file(folder: Path, units: Any = UNITS) -> Path:
    path = folder / "units.json"
    path.write_text(json.dumps(units))
    return path


def tuned(method: Method, model: Path, data: Path, folder: Path, **changes: Any) -> dict[str, Tensor]:
    options = METHODS[method].options(**(HARD | changes))
    units = [] if METHODS[method].units == "none" else [units_file(folder)]
    tune(method, Checkpoint.open(model), [data], options, folder / "out", units=units)
    return load_file(folder / "out" / WEIGHTS)


def masks(before: dict[str, Tensor], *, gate: bool) -> dict[str, Tensor]:
    """The entries that ``UNITS`` are made of, written out for 4 heads of width 8 on 2 key heads."""
    found = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in before.items()}
    for layer, neurons in ((0, [3, 17]), (2, [5])):
        here = f"model.layers.{layer}.mlp."
        for name in ("up_proj", *(["gate_proj"] if gate else [])):
            found[f"{here}{name}.weight"][neurons] = True
        found[f"{here}down_proj.weight"][:, neurons] = True
    # Head 2 shares the keys and values of group 1 with head 3.
    here = "model.layers.1.self_attn."
    found[f"{here}q_proj.weight"][16:24] = True
    found[f"{here}k_proj.weight"][8:16] = True
    found[f"{here}v_proj.weight"][8:16] = True
    found[f"{here}o_proj.weight"][:, 16:24] = True
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16)


@pytest.mark.parametrize(("method", "gate"), [("sn", False), ("budget", True)])
def test_only_the_units_change(method: Method, gate: bool, model: Path, data: Path, tmp_path: Path) -> None:
    before = load_file(model / WEIGHTS)
    after = tuned(method, model, data, tmp_path)
    assert after.keys() == before.keys()
    # The embedding is tied: one tensor, which no slice reaches.
    assert "lm_head.weight" not in after
    trained = 0
    for name, mask in masks(before, gate=gate).items():
        changed = bits(after[name]) != bits(before[name])
        assert not changed[~mask].any()
        if mask.any():
            assert changed[mask].float().mean() > 0.5
        trained += int(mask.sum())
    record = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert record["parameters"]["trained"] == trained
    assert 0 < record["output"]["changed"] <= trained


@pytest.mark.parametrize("method", ["freeze", "rsn"])
def test_frozen_units_stay_while_everything_else_trains(
    method: Method, model: Path, data: Path, tmp_path: Path
) -> None:
    before = load_file(model / WEIGHTS)
    after = tuned(method, model, data, tmp_path, rate=0.05)
    for name, mask in masks(before, gate=True).items():
        changed = bits(after[name]) != bits(before[name])
        assert not changed[mask].any()
        assert changed[~mask].float().mean() > 0.5


def test_foundation_units_are_not_protected(model: Path, data: Path, tmp_path: Path) -> None:
    before = load_file(model / WEIGHTS)
    foundation = tmp_path / "foundation.json"
    foundation.write_text(json.dumps({"0": [3]}))
    tune(
        "rsn",
        Checkpoint.open(model),
        [data],
        given.RsnOptions(**HARD),
        tmp_path / "out",
        units=[units_file(tmp_path)],
        foundation=[foundation],
    )
    after = load_file(tmp_path / "out" / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    changed = bits(after[name]) != bits(before[name])
    assert changed[3].any()
    assert not changed[17].any()


def test_without_units_every_weight_trains(model: Path, data: Path, tmp_path: Path) -> None:
    before, after = load_file(model / WEIGHTS), tuned("full", model, data, tmp_path, rate=0.05)
    assert all((bits(after[name]) != bits(value)).any() for name, value in before.items())


def test_gradients_that_are_summed_up_reach_the_same_numbers(model: Path, data: Path, tmp_path: Path) -> None:
    before = load_file(model / WEIGHTS)
    after = tuned("sn", model, data, tmp_path, at_once=4)
    for name, mask in masks(before, gate=False).items():
        assert torch.equal(bits(after[name])[~mask], bits(before[name])[~mask])


def test_bfloat16_trains_numbers_in_float32(model: Path, data: Path, tmp_path: Path) -> None:
    before = load_file(model / WEIGHTS)
    # So small a rate is lost in bfloat16 and is not in float32.
    changes: dict[str, Any] = {"rate": 1e-5, "dtype": "bfloat16", "weights": "float32"}
    after = tuned("sn", model, data, tmp_path, **changes)
    assert {value.dtype for value in after.values()} == {torch.float32}
    for name, mask in masks(before, gate=False).items():
        changed = after[name] != before[name].float()
        assert not changed[~mask].any()
        if mask.any():
            assert changed[mask].float().mean() > 0.5
    assert Checkpoint.open(tmp_path / "out").load_model("float32").dtype == torch.float32


def test_what_rounding_would_lose_is_an_error(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(TuneError, match="lost in rounding to torch"):
        tuned("sn", model, data, tmp_path, rate=1e-7)
    assert not (tmp_path / "out").exists()


def test_a_number_that_was_not_to_change_is_found(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][4, 0] += 1
    save_file(weights, tmp_path / WEIGHTS)
    assert compared(model, tmp_path, Prepared(None, (Part(name[:-7], 0, [4]),), inside=True), {name})[0] == 1
    for parts, inside in (((Part(name[:-7], 0, [5]),), True), ((Part(name[:-7], 1, [0]),), False)):
        with pytest.raises(TuneError, match="differs where nothing was trained"):
            compared(model, tmp_path, Prepared(None, parts, inside), {name})


def test_a_tensor_that_is_missing_is_found_unless_it_is_no_parameter(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    del weights[name]
    save_file(weights, tmp_path / WEIGHTS)
    nothing = Prepared(None, (), inside=True)
    assert compared(model, tmp_path, nothing, set())[0] == 0
    for before, after in ((model, tmp_path), (tmp_path, model)):
        with pytest.raises(TuneError, match=rf"other tensors than .*{name}"):
            compared(before, after, nothing, {name})


def test_only_the_answer_is_learnt_and_it_ends(model: Path, data: Path) -> None:
    from guard.tune.objective import Collator, Item
    from guard.tune.rows import read

    checkpoint, options = Checkpoint.open(model), given.FullOptions(refusal=REFUSAL)
    tokenizer = checkpoint.load_tokenizer()
    made = texts(read([data], options).rows, checkpoint.load_model(), tokenizer, options, progress=False)
    assert tokenizer.decode(made[0].answer) == "No.<|end|>"
    assert tokenizer.decode(made[0].prompt).endswith("<|end|><|assistant|>")
    batch = Collator(4.0)([Item(made[0]), Item(made[-1])])
    weights = batch["weights"]
    first = len(made[0].prompt)
    assert weights[0].tolist() == [0.0] * first + [4.0] + [1.0] * 3 + [0.0] * (weights.shape[1] - first - 4)
