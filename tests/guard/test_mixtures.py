"""Mixtures of experts on the way to a bundle: what is fitted, what is refused, and what a card says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from guard.bundle import Bundle, BundleError, ModelCard
from guard.capture import read_prompts
from guard.card import GuardCard, card_bytes
from guard.checkpoint import Checkpoint
from guard.cli import main
from guard.sites import ModelShape, NoSuchSiteError
from guard.units import read_units
from loadtests.random_model import Reference
from tests.engine import architectures, world
from tests.guard import worlds

ROUTED = ModelShape("MixtralForCausalLM", 3, mlp_width=0, heads=4, head_dim=8)
DENSE_FIRST = ModelShape("Glm4MoeForCausalLM", 3, mlp_width=48, heads=4, head_dim=8, first_mlp_layer=1)


def model_card(shape: ModelShape) -> ModelCard:
    return ModelCard(name="toy", weights_sha256="0", tokenizer_sha256="1", **shape._asdict())


def card(shape: ModelShape) -> GuardCard:
    return GuardCard.model_validate(worlds.card(model=model_card(shape).model_dump()))


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [(ROUTED, "its neurons are in routed experts"), (DENSE_FIRST, "layer 0 of this .* has no MLP site")],
)
def test_bundle_that_reads_neurons_where_there_are_none_is_refused(
    tmp_path: Path, shape: ModelShape, sentence: str
) -> None:
    directory = worlds.bundle().save(tmp_path / "bundle")
    document = json.loads((directory / "guard.json").read_text())
    document["model"].update(shape._asdict())
    (directory / "guard.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=sentence):
        Bundle.load(directory)


@pytest.mark.parametrize(
    ("shape", "sentence"), [(ROUTED, "routed experts"), (DENSE_FIRST, "begin at layer 1")]
)
def test_units_file_that_names_neurons_where_there_are_none_is_refused(
    tmp_path: Path, shape: ModelShape, sentence: str
) -> None:
    (tmp_path / "units.json").write_text('{"0": [3]}')
    with pytest.raises(NoSuchSiteError, match=sentence):
        read_units(tmp_path / "units.json", shape)


@pytest.mark.parametrize("units", ["l1", "all"])
def test_fit_says_what_to_read_instead_of_routed_experts(tmp_path: Path, units: str) -> None:
    model = architectures.make_model(tmp_path / "model", "mixtral")
    for name, label in (("fit", "harmful"), ("threshold", "benign")):
        worlds.write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name, "label": label, "source": name}])
    options = {
        "--model": model,
        "--data": tmp_path / "fit.jsonl",
        "--threshold-data": tmp_path / "threshold.jsonl",
        "--out": tmp_path / "bundle",
        "--units": units,
    }
    result = CliRunner().invoke(main, ["fit", *(str(part) for item in options.items() for part in item)])
    assert result.exit_code == 1
    assert "routed experts, which see only the tokens sent to them" in result.output
    assert '{"attention": {"3": [0, 1]}}' in result.output


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_padded_batches_read_what_single_prompts_do(tmp_path: Path, kind: str) -> None:
    """Experts take tokens of all rows in one list, padding included."""
    model, sites = architectures.make_model(tmp_path / "model", kind), architectures.sites(kind)
    prompts, reference = world.prompts(9, seed=5, longest=60), Reference(model, sites)
    together = read_prompts(Checkpoint.open(model).load_model(), sites, prompts)
    np.testing.assert_allclose(together, [reference.features(prompt) for prompt in prompts], atol=1e-4)


def test_card_names_the_first_layer_with_a_site_only_when_it_is_not_the_first_of_all() -> None:
    sites = [{"layer": 1, "kind": "mlp", "units": [1]}]
    later = GuardCard.model_validate(worlds.card(model=model_card(DENSE_FIRST).model_dump(), sites=sites))
    assert json.loads(card_bytes(later))["model"]["first_mlp_layer"] == 1
    assert GuardCard.model_validate_json(card_bytes(later)).model.shape == DENSE_FIRST
    assert (
        "first_mlp_layer"
        not in json.loads(card_bytes(card(DENSE_FIRST._replace(first_mlp_layer=0))))["model"]
    )
