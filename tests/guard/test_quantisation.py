"""Quantised checkpoints offline: what is read, and what is refused before anything is fitted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.bundle import BundleError
from guard.capture import read_prompts
from guard.checkpoint import Checkpoint, CheckpointError
from guard.quantisation import unshown
from loadtests.random_model import Reference
from tests.engine import quantised, world

# Loading through compressed-tensors imports a part of torch that speaks of its own deprecation.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def changed(**weights: Any) -> dict[str, Any]:
    document = quantised.config("w4a16")
    document["config_groups"]["group_0"]["weights"].update(weights)
    return document


def test_four_bit_weights_are_read_as_what_they_stand_for(tmp_path: Path) -> None:
    made = quantised.make_models(tmp_path)
    prompts = world.prompts(6, seed=4, longest=60)
    read = read_prompts(Checkpoint.open(made.quantised).load_model(), quantised.SITES, prompts)
    reference = Reference(made.expanded, quantised.SITES)
    np.testing.assert_allclose(read, [reference.features(prompt) for prompt in prompts], atol=1e-4)


def test_bundle_of_the_quantised_checkpoint_is_not_that_of_the_expanded_one(tmp_path: Path) -> None:
    made = quantised.make_models(tmp_path)
    bundle = quantised.make_bundle(tmp_path / "bundle", made)
    for path, matches in ((made.quantised, True), (made.expanded, False)):
        card = Checkpoint.open(path).card()
        found = {"weights_sha256": card.weights_sha256, "tokenizer_sha256": card.tokenizer_sha256}
        if matches:
            bundle.verify_model(shape=card.shape, **found)
        else:
            with pytest.raises(BundleError, match="weights digest"):
                bundle.verify_model(shape=card.shape, **found)


@pytest.mark.parametrize(
    ("document", "name"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq (transformers reads it only with the package gptqmodel)"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes (not run)"),
        ({"bits": 4}, "an unnamed method (not run)"),
        (quantised.config("w8a8"), "with rounded inputs"),
        ({**quantised.config("w4a16"), "kv_cache_scheme": {"num_bits": 8}}, "with kv_cache_scheme (not run)"),
        ({**quantised.config("w4a16"), "format": "int-quantized"}, "in another form of weights"),
        ({**quantised.config("w4a16"), "config_groups": {}}, "in another form of weights"),
        (changed(num_bits=8), "in another form of weights"),
        (changed(type="float"), "in another form of weights"),
        (changed(symmetric=False), "in another form of weights"),
        (changed(strategy="channel"), "in another form of weights"),
        (changed(actorder="group"), "in another form of weights"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_everything_but_what_was_shown_is_named(document: dict[str, Any], name: str) -> None:
    assert name in unshown(document)
    assert unshown(quantised.config("w4a16")) == ""


def test_checkpoint_of_another_kind_is_refused_before_it_is_read(tmp_path: Path) -> None:
    model = quantised.make_models(tmp_path, "w8a8").quantised
    with pytest.raises(CheckpointError, match="quantised as compressed-tensors with rounded inputs"):
        Checkpoint.open(model)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(quantised.make_models(tmp_path).quantised)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(CheckpointError, match="needs the package compressed-tensors"):
        checkpoint.load_model()
