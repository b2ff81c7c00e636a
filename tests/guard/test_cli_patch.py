"""``neuronguard bundle patch``: each kind of patch as it lies in the bundle, and each mistake by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from guard.bundle import Bundle, GuardCard
from guard.checkpoint import Checkpoint
from guard.patch import Patch
from tests.guard import worlds
from tests.guard.test_cli import run

LAYERS, WIDTH, HIDDEN = 3, 48, 32
UNITS = {"0": [3, 17], "2": [5]}
TABLE = np.arange(LAYERS * WIDTH, dtype=np.float32).reshape(LAYERS, WIDTH)
CHOSEN = TABLE[[0, 0, 2], [3, 17, 5]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a bundle that belongs to it, and the files that patches are made from."""
    root = tmp_path_factory.mktemp("world")
    made = worlds.model()
    model = worlds.checkpoint(root / "model", made)
    worlds.adapter(root / "lora", made)
    worlds.checkpoint(root / "twin", worlds.model(seed=1))
    worlds.checkpoint(root / "deeper", worlds.model(num_hidden_layers=4))
    worlds.checkpoint(root / "foreign", worlds.model())
    config = json.loads((root / "foreign" / "tokenizer.json").read_text())
    config["normalizer"] = {"type": "Lowercase"}
    (root / "foreign" / "tokenizer.json").write_text(json.dumps(config))
    blank = worlds.bundle()
    changes = {"model": Checkpoint.open(model).card()}
    Bundle(GuardCard.model_validate(blank.card.model_dump() | changes), blank.scorer).save(root / "bundle")
    (root / "units.json").write_text(json.dumps(UNITS))
    (root / "heads.json").write_text(json.dumps({"attention": {"1": [0, 2]}}))
    (root / "outside.json").write_text(json.dumps({"1": [WIDTH]}))
    (root / "below.json").write_text(json.dumps({str(LAYERS): [0]}))
    save_file({"mean.donor": TABLE, "direction": TABLE[0, :HIDDEN]}, root / "mean.safetensors")
    save_file({"mean.donor": TABLE[:2], "direction": TABLE[0]}, root / "small.safetensors")
    save_file({"other": TABLE}, root / "other.safetensors")
    name = "model.layers.{}.mlp.down_proj.ia3"
    save_file({name.format(layer): TABLE[layer] for layer in (0, 2)}, root / "vector.safetensors")
    save_file({name.format(LAYERS): TABLE[0]}, root / "deep.safetensors")
    save_file({name.format(0): TABLE[0, :9]}, root / "narrow.safetensors")
    (root / "not.safetensors").write_text("no tensors")
    return root


def command(world: Path, out: Path, *more: object, units: str = "units.json") -> list[object]:
    """``more`` names files by their name in the world."""
    paths = [world / part if isinstance(part, str) and (world / part).exists() else part for part in more]
    named = ["--units", world / units] if units else []
    return ["bundle", "patch", world / "bundle", "--model", world / "model", "--name", "calm",
            "--out", out, *named, *paths]  # fmt: skip


def made(world: Path, out: Path, *more: object, units: str = "units.json") -> Patch:
    result = run(*command(world, out, *more, units=units))
    assert result.exit_code == 0, result.output
    return Bundle.load(out).patches["calm"]


@pytest.mark.parametrize(
    ("asked", "scale", "shift"),
    [
        (["--zero"], [0, 0, 0], [0, 0, 0]),
        (["--scale", 0.5], [0.5, 0.5, 0.5], [0, 0, 0]),
        (["--mean", "mean.safetensors"], [0, 0, 0], CHOSEN),
        # Layer 2 has a vector, layer 1 none; of layer 2 neuron 5 is chosen.
        (["--vector", "vector.safetensors", "--stored"], CHOSEN, [0, 0, 0]),
    ],
    ids=["zero", "scale", "mean", "stored vector"],
)
def test_a_stored_patch_has_a_scale_and_a_shift_for_each_unit(
    world: Path, tmp_path: Path, asked: list[object], scale: Any, shift: Any
) -> None:
    patch = made(world, tmp_path / "out", *asked)
    assert patch.card.kind == "stored"
    assert {str(site.layer): list(site.units) for site in patch.card.sites} == UNITS
    np.testing.assert_array_equal(patch.arrays["scale"], np.float32(scale))
    np.testing.assert_array_equal(patch.arrays["shift"], np.float32(shift))


def test_a_vector_is_the_donor_unless_it_is_stored(world: Path, tmp_path: Path) -> None:
    patch = made(world, tmp_path / "out", "--vector", "vector.safetensors")
    assert (patch.card.kind, patch.card.donor) == ("dynamic", None)
    expected = TABLE.copy()
    expected[1] = 1.0
    np.testing.assert_array_equal(patch.arrays["vector"], expected)


def test_a_donor_is_bound_by_its_digest(world: Path, tmp_path: Path) -> None:
    patch = made(world, tmp_path / "out", "--donor", "twin", units="heads.json")
    assert patch.card.donor is not None
    assert patch.card.donor.weights_sha256 == Checkpoint.open(world / "twin").weights_sha256
    assert [(site.kind, site.units) for site in patch.card.sites] == [("attention", (0, 2))]


def test_steering_adds_a_direction_of_the_given_length_at_each_layer(world: Path, tmp_path: Path) -> None:
    steer = ["--direction", "mean.safetensors", "--strength", -2, "--layer", 2, "--layer", 0]
    patch = made(world, tmp_path / "out", *steer, units="")
    assert [(site.layer, site.kind, len(site.units)) for site in patch.card.sites] == [
        (0, "residual", HIDDEN),
        (2, "residual", HIDDEN),
    ]
    direction = TABLE[0, :HIDDEN] / np.linalg.norm(TABLE[0, :HIDDEN])
    np.testing.assert_allclose(patch.arrays["shift"], np.tile(-2 * direction, 2), rtol=1e-6)
    np.testing.assert_array_equal(patch.arrays["scale"], 1.0)


def test_words_are_kept_with_their_tokens(world: Path, tmp_path: Path) -> None:
    patch = made(world, tmp_path / "out", "--prefix", "Well, ", units="")
    assert (patch.card.kind, patch.card.prefix) == ("prefix", "Well, ")
    assert worlds.tokenizer().decode(patch.card.prefix_tokens) == "Well, "


def test_a_patch_changes_the_digest_and_is_shown(world: Path, tmp_path: Path) -> None:
    made(world, tmp_path / "out", "--zero")
    assert Bundle.load(tmp_path / "out").digest != Bundle.load(world / "bundle").digest
    assert "patch      calm, stored, 3 units" in run("bundle", "show", tmp_path / "out").output


USAGE, FAILED = 2, 1


@pytest.mark.parametrize(
    ("asked", "units", "code", "said"),
    [
        ([], "units.json", USAGE, "there are 0: none"),
        (["--zero", "--scale", 2], "units.json", USAGE, "there are 2: --zero, --scale"),
        (["--zero"], "", USAGE, "--units goes with everything but --prefix and --direction"),
        (["--prefix", "Well"], "units.json", USAGE, "--units goes with everything but --prefix"),
        (["--zero", "--stored"], "units.json", USAGE, "--stored goes with --vector"),
        (["--zero", "--strength", 1], "units.json", USAGE, "--strength go together"),
        (["--direction", "mean.safetensors", "--layer", 1], "", USAGE, "--strength go together"),
        (["--zero"], "outside.json", FAILED, f"mlp unit {WIDTH} of layer 1 does not exist"),
        (["--zero"], "below.json", FAILED, f"layer {LAYERS} does not exist"),
        (["--zero"], "nowhere.json", FAILED, "cannot read the units file"),
        (["--mean", "mean.safetensors"], "heads.json", FAILED, "the units hold attention heads"),
        (["--mean", "small.safetensors"], "units.json", FAILED, f"for 2 layers of {WIDTH} neurons"),
        (["--mean", "other.safetensors"], "units.json", FAILED, "no table 'mean.donor'; it has: other"),
        (["--mean", "not.safetensors"], "units.json", FAILED, "not a readable safetensors file"),
        (["--mean", "nowhere.safetensors"], "units.json", FAILED, "not a readable safetensors file"),
        (["--vector", "deep.safetensors"], "units.json", FAILED, "is no vector of a layer of model"),
        (["--vector", "narrow.safetensors"], "units.json", FAILED, f"shape [9], expected [{WIDTH}]"),
        (["--donor", "lora"], "units.json", FAILED, "is a LoRA adapter, and a donor is a whole checkpoint"),
        (["--donor", "deeper"], "units.json", FAILED, "the donor deeper has another shape than model"),
        (["--donor", "foreign"], "units.json", FAILED, "another tokenizer or chat template than model"),
        (["--donor", "nowhere"], "units.json", FAILED, "there is no model directory nowhere"),
        (["--direction", "small.safetensors", "--layer", 1, "--strength", 1], "", FAILED,
         f"has {WIDTH} columns, but the residual stream of model has {HIDDEN}"),
        (["--direction", "mean.safetensors", "--layer", LAYERS, "--strength", 1], "", FAILED,
         f"layer {LAYERS}, but the model has {LAYERS} layers"),
        (["--direction", "other.safetensors", "--layer", 1, "--strength", 1], "", FAILED,
         "no vector 'direction'"),
        (["--prefix", "x" * 65], "", FAILED, "64"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_and_nothing_is_written(
    world: Path, tmp_path: Path, asked: list[object], units: str, code: int, said: str
) -> None:
    result = run(*command(world, tmp_path / "out", *asked, units=units))
    assert (result.exit_code, said in result.output) == (code, True), result.output
    assert not (tmp_path / "out").exists()


def test_a_bundle_of_another_model_gets_no_patch(world: Path, tmp_path: Path) -> None:
    asked = command(world, tmp_path / "out", "--zero")
    asked[asked.index(world / "model")] = world / "twin"
    result = run(*asked)
    assert result.exit_code == FAILED
    assert "does not belong to the served model" in result.output


def test_a_name_is_given_once(world: Path, tmp_path: Path) -> None:
    made(world, tmp_path / "one", "--zero")
    asked = command(world, tmp_path / "two", "--zero")
    asked[asked.index(world / "bundle")] = tmp_path / "one"
    result = run(*asked)
    assert result.exit_code == FAILED
    assert "the bundle has a patch 'calm' already" in result.output


def test_nothing_but_a_bundle_is_written_over(world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = run(*command(world, tmp_path / "out", "--zero"))
    assert result.exit_code == USAGE
    assert "exists and is not a bundle" in result.output
