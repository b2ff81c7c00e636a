from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guard.checkpoint import Checkpoint
from guard.digest import weights_digest
from guard.ia3 import VECTOR_NAME, fold_checkpoint
from guard.lab import LabError, materialise, resolve, variants
from tests.guard import worlds

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    root = worlds.checkpoint(tmp_path / "lab", worlds.model(dtype=torch.bfloat16))
    vector = torch.ones(48)
    vector[[3, 9]] = torch.tensor([2.0, -0.5])
    save_file({VECTOR_NAME.format(layer=1): vector}, root / "ia3.safetensors")
    entries = {
        "lab-sft": {"vector": None, "alpha": 0.0},
        "lab-aligned": {"vector": "ia3.safetensors", "alpha": 1.0, "note": "ignored"},
        "lab-partial": {"vector": "ia3.safetensors", "alpha": 0.5},
    }
    (root / "lab.json").write_text(json.dumps({"variants": entries, "refusal": "no"}))
    return root


def test_folding_scales_columns_and_rounds_once(lab: Path, tmp_path: Path) -> None:
    before = load_file(lab / "model.safetensors")
    folded = fold_checkpoint(lab, tmp_path / "out", vector=lab / "ia3.safetensors", alpha=0.5)
    after = load_file(folded / "model.safetensors")
    scale = torch.ones(48, dtype=torch.float64)
    scale[[3, 9]] = torch.tensor([1.5, 0.25], dtype=torch.float64)
    assert torch.equal(after[NAME], (before[NAME].double() * scale).to(torch.bfloat16))
    assert all(torch.equal(after[name], before[name]) for name in before if name != NAME)


def test_a_folded_model_computes_what_the_vector_does(lab: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(fold_checkpoint(lab, tmp_path / "base")).load_model()
    twin = Checkpoint.open(
        fold_checkpoint(lab, tmp_path / "twin", vector=lab / "ia3.safetensors")
    ).load_model()
    vector = load_file(lab / "ia3.safetensors")[VECTOR_NAME.format(layer=1)]
    base.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] * vector,))
    ids = torch.tensor([[1, 70, 80, 0, 2]])
    # Scaling a column rounds it to bfloat16 once; scaling the activation does not.
    torch.testing.assert_close(twin(input_ids=ids).logits, base(input_ids=ids).logits, atol=0.05, rtol=0.05)


def test_a_vector_of_another_width_is_refused_and_nothing_is_left(lab: Path, tmp_path: Path) -> None:
    save_file({VECTOR_NAME.format(layer=1): torch.ones(47)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        fold_checkpoint(lab, tmp_path / "made" / "out", vector=tmp_path / "bad.safetensors")
    assert not (tmp_path / "made").exists()


def test_each_variant_is_made_once(lab: Path) -> None:
    made = {name: materialise(lab, name) for name in variants(lab)}
    assert len({weights_digest(path) for path in made.values()}) == 3
    stamps = {path: (path / "model.safetensors").stat().st_mtime_ns for path in made.values()}
    assert {name: materialise(lab, name) for name in made} == made
    assert all((path / "model.safetensors").stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_the_base_variant_is_the_base(lab: Path) -> None:
    made = materialise(lab, "lab-sft")
    assert torch.equal(
        load_file(made / "model.safetensors")[NAME], load_file(lab / "model.safetensors")[NAME]
    )
    assert Checkpoint.open(made).shape.layers == 3


def test_another_strength_or_vector_is_another_checkpoint(lab: Path) -> None:
    before = materialise(lab, "lab-partial")
    document = json.loads((lab / "lab.json").read_text())
    document["variants"]["lab-partial"]["alpha"] = 0.6
    (lab / "lab.json").write_text(json.dumps(document))
    assert materialise(lab, "lab-partial") != before


def test_two_that_ask_at_once_get_the_same_whole_checkpoint(lab: Path) -> None:
    made: list[Path] = []
    threads = [
        threading.Thread(target=lambda: made.append(materialise(lab, "lab-aligned"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 1
    assert len(made) == 4


def test_names_resolve_to_checkpoints(lab: Path, tmp_path: Path) -> None:
    plain = worlds.checkpoint(tmp_path / "plain", worlds.model())
    assert resolve(str(plain)) == (plain, "plain")
    path, name = resolve(f"{lab}:lab-partial")
    assert (path, name) == (materialise(lab, "lab-partial"), "lab-partial")


def test_mistakes_are_answered_with_what_there_is(lab: Path, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no variant 'lab-x'; there are: lab-aligned, lab-partial, lab-sft"):
        materialise(lab, "lab-x")
    with pytest.raises(LabError, match=r"several models; name one: .*:lab-aligned"):
        resolve(str(lab))
    with pytest.raises(LabError, match="no model directory"):
        resolve(str(tmp_path / "gone"))
    with pytest.raises(LabError, match="not a readable lab file"):
        variants(tmp_path)
    (lab / "ia3.safetensors").unlink()
    with pytest.raises(LabError, match="incomplete"):
        materialise(lab, "lab-aligned")
