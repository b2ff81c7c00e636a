"""The walk-through of docs/tuning.md on a tiny model, command by command, up to what the engine loads.

The engine's own half, a bundle with a stored patch of a vector that answers a flagged request, is in
``tests/e2e/test_patch.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from guard.bundle import Bundle
from guard.checkpoint import Checkpoint
from guard.locate.unit_set import UnitSet
from guard.patch import applied
from guard.prompts import encode
from tests.guard import worlds
from tests.guard.conftest import planted as planted  # a fixture
from tests.guard.test_cli import fitting, run
from tests.tune.conftest import REFUSAL


def did(*command: object) -> str:
    result = run(*command)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def loop(planted: worlds.Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, prompts of both kinds, and what the commands make of them."""
    root = tmp_path_factory.mktemp("loop")
    model = ["--model", planted.model]
    lines = planted.fit.read_text().splitlines(keepends=True)
    by_label = [[line for line in lines if f'"{label}"' in line][:24] for label in ("harmful", "benign")]
    (root / "prompts.jsonl").write_text("".join(line for each in by_label for line in each))
    data = ["--data", root / "prompts.jsonl"]
    did("locate", "capacity", *model, *data, "--out", root / "units")
    twin = ["--refusal", REFUSAL, "--own-answers", 4, "--steps", 6]
    did("tune", "ia3", *model, *data, *twin, "--out", root / "twin")
    did("tune", "ia3", *model, *data, *twin, "--whole", "--out", root / "donor")
    compared = ["--donor", root / "donor", "--positions", "prompt_last", "--new-tokens", 4]
    did("locate", "contrast", *model, *data, *compared, "--fraction", 1, "--out", root / "changed")
    did(*fitting(planted, root / "bundle", "--max-units", 40))
    made = ["--units", root / "changed", "--vector", root / "twin" / "ia3.safetensors", "--stored"]
    did("bundle", "patch", root / "bundle", *model, "--name", "calm", *made, "--out", root / "patched")
    return root


def test_the_located_set_is_of_the_model_and_the_donor_of_its_weights(
    loop: Path, planted: worlds.Planted
) -> None:
    base = Checkpoint.open(planted.model)
    assert UnitSet.load(loop / "units").provenance.model.weights_sha256 == base.weights_sha256
    changed = UnitSet.load(loop / "changed").provenance
    assert changed.donor is not None
    assert changed.donor.weights_sha256 == Checkpoint.open(loop / "donor").weights_sha256


def test_the_bundle_belongs_to_the_model_and_has_the_twins_factors(
    loop: Path, planted: worlds.Planted
) -> None:
    verified = run("bundle", "verify", loop / "patched", "--model", planted.model)
    assert verified.exit_code == 0, verified.output
    patch = Bundle.load(loop / "patched").patches["calm"]
    assert patch.card.kind == "stored"
    assert np.abs(patch.arrays["scale"] - 1).max() > 0.01


def test_patched_in_every_neuron_the_model_answers_as_its_twin(loop: Path, planted: worlds.Planted) -> None:
    patch = Bundle.load(loop / "patched").patches["calm"]
    model = Checkpoint.open(planted.model).load_model()
    tokenizer = worlds.tokenizer()
    ids = torch.tensor([encode(tokenizer, [{"role": "user", "content": "one two three"}])])

    def logits(of: object) -> Tensor:
        with torch.no_grad():
            found: Tensor = of(input_ids=ids).logits  # type: ignore[operator]
        return found

    plain, twin = logits(model), logits(Checkpoint.open(loop / "donor").load_model())
    with applied(patch, model):
        patched = logits(model)
    assert (patched - twin).abs().max() < 1e-4 * (plain - twin).abs().max()
