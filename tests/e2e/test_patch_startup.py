"""Patches that an engine cannot run, and the sentence its start ends in. Needs no weights."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from guard import patch as patches
from guard.bundle import Bundle, BundleError
from guard.engine.config import GuardConfig
from guard.engine.errors import GuardStartupError
from guard.patch import PatchError
from guard.patch_card import PatchSite
from loadtests import random_model
from tests.e2e.inprocess import ENGINE, SETTINGS
from tests.engine import world
from tests.guard import worlds

SITES = (PatchSite(layer=0, kind="mlp", units=(1, 2)),)


@pytest.fixture(scope="module")
def dynamic(tiny_bundle, tmp_path_factory):
    shape = tiny_bundle.card.model.shape
    vector = np.ones((shape.layers, shape.mlp_width), dtype=np.float32)
    bundle = tiny_bundle.with_patch(patches.from_vector("donor", SITES, vector, shape))
    return bundle.save(tmp_path_factory.mktemp("dynamic") / "bundle")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"enforce_eager": False}, "eager mode only; start with --enforce-eager"),
        ({"enable_lora": True}, "do not work beside LoRA adapters; start without --enable-lora"),
    ],
    ids=["compiled", "LoRA"],
)
def test_a_donor_is_refused_where_it_cannot_run(tiny_model, tiny_bundle_dir, dynamic, options, said):
    os.environ.update(SETTINGS)
    from vllm.engine.arg_utils import EngineArgs

    from guard.engine.donor import refuse_donor
    from guard.engine.worker import GuardWorker, is_replayed

    entry = GuardConfig.for_bundle(str(dynamic), Bundle.load(dynamic)).entry()
    arguments = {"model": str(tiny_model), **ENGINE, **options, "additional_config": entry}
    worker = GuardWorker.__new__(GuardWorker)
    worker.vllm_config = EngineArgs(**arguments).create_engine_config()
    with pytest.raises(GuardStartupError, match=said):
        worker.load_model()
    refuse_donor(Bundle.load(tiny_bundle_dir), worker.vllm_config, replayed=is_replayed(worker.vllm_config))


def test_a_donor_that_is_not_the_bundles_is_refused(tiny_model, tmp_path):
    from guard.engine.donor import load_donor

    other = random_model.make_model(tmp_path / "other", world.SIZES, seed=9)
    adapter = worlds.adapter(tmp_path / "lora", worlds.model())
    for checkpoint, said in (
        (None, "name its directory with --guard-donor"),
        (other, "is not the donor"),
        (adapter, "is a LoRA adapter, and a donor is a whole checkpoint"),
        (tmp_path / "nowhere", "there is no such directory"),
    ):
        with pytest.raises(GuardStartupError, match=said):
            load_donor(None, checkpoint and str(checkpoint), "0" * 64)


def test_two_donors_are_refused(dynamic, tmp_path):
    from guard.engine.donor import Donor

    bundle = Bundle.load(dynamic)
    shape = bundle.card.model.shape
    vector = np.full((shape.layers, shape.mlp_width), 2, dtype=np.float32)
    both = bundle.with_patch(patches.from_vector("another", SITES, vector, shape))
    with pytest.raises(GuardStartupError, match="'donor' and 'another' have different donors"):
        Donor(both, None, None, None)


def test_units_outside_the_model_are_refused_by_the_bundle(tiny_bundle, tmp_path):
    shape = tiny_bundle.card.model.shape
    for site, said in (
        (PatchSite(layer=shape.layers, kind="mlp", units=(0,)), f"layer {shape.layers}, but the model has"),
        (PatchSite(layer=0, kind="mlp", units=(shape.mlp_width,)), f"mlp unit {shape.mlp_width} of layer 0"),
        (PatchSite(layer=0, kind="attention", units=(shape.heads,)), f"attention unit {shape.heads}"),
    ):
        with pytest.raises(PatchError, match=said):
            patches.stored("outside", (site,), shape, scale=0.0)
    patched = tiny_bundle.with_patch(patches.stored("inside", SITES, shape, scale=0.0))
    folder = patched.save(tmp_path / "bundle")
    document = json.loads((folder / "guard.json").read_text())
    document["patches"][0]["sites"][0]["layer"] = shape.layers
    (folder / "guard.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=f"layer {shape.layers}, but the model has"):
        Bundle.load(folder)
