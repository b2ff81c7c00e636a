"""The models of a run with their bundles and the scores they must give, made once in the shared folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from guard.bundle import Bundle, Site
from guard.capture import Float32Array, read_batch
from guard.checkpoint import DTYPES
from guard.self_test import ROUNDING_MARGIN
from loadtests import random_model
from loadtests.bench import LARGE
from tests.engine import world

PROMPTS = 60
_GENERATOR = np.random.default_rng(0)
SITES: dict[str, tuple[Site, ...]] = {
    "tiny": world.SITES,
    "large": tuple(
        Site(layer=layer, kind="mlp", units=tuple(sorted(_GENERATOR.choice(2048, 100, False).tolist())))
        for layer in range(12)
    ),
}


class World(NamedTuple):
    """A model, its bundle, prompts, and the prompts' logits by transformers, by dtype."""

    model: Path
    bundle: Path
    prompts: list[list[int]]
    logits: dict[str, list[float]]
    tolerance: dict[str, float]


def prepare(folder: Path, name: str, device: str) -> World:
    """Make ``tiny`` or ``large`` with scores in float32 and bfloat16, or find what an earlier check made."""
    target = folder / name
    if not target.exists():
        part = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder))
        _make(part, name, device)
        part.rename(target)
    known = json.loads((target / "known.json").read_text("utf-8"))
    return World(target / "model", target / "bundle", **known)


def _make(folder: Path, name: str, device: str) -> None:
    model = random_model.make_model(folder / "model", world.SIZES if name == "tiny" else LARGE)
    prompts = world.prompts(PROMPTS, seed=5)
    fitted = random_model.make_bundle(folder / "float32", model, SITES[name], world.prompts(60, seed=1000))
    # float32 from transformers alone, by hooks of its own; bfloat16 as the bundle's maker measures it.
    reference = random_model.Reference(model, SITES[name])
    exact = fitted.logits(np.stack([reference.features(prompt) for prompt in prompts]))
    rough = scores(model, fitted, prompts, "bfloat16", device)
    bundle = in_both_dtypes(model, fitted, float(np.abs(rough - exact).max()), device)
    bundle.save(folder / "bundle")
    shutil.rmtree(folder / "float32")
    known = {
        "prompts": prompts,
        "logits": {"float32": exact.tolist(), "bfloat16": rough.tolist()},
        "tolerance": dict(bundle.card.self_test.tolerance),
    }
    (folder / "known.json").write_text(json.dumps(known))


def in_both_dtypes(model: Path, bundle: Bundle, deviation: float, device: str) -> Bundle:
    """The bundle with self-test scores in bfloat16 too.

    ``deviation`` is a known |bfloat16 logit - float32 logit|; the tolerance follows it or a larger one here.
    """
    test = bundle.card.self_test
    rough = scores(model, bundle, [list(prompt) for prompt in test.prompts], "bfloat16", device)
    largest = max(deviation, float(np.abs(rough - np.array(test.logits["float32"], np.float32)).max()))
    both = test.model_copy(
        update={
            "logits": {**test.logits, "bfloat16": tuple(float(x) for x in rough)},
            "tolerance": {**test.tolerance, "bfloat16": ROUNDING_MARGIN * largest},
        }
    )
    return Bundle(bundle.card.model_copy(update={"self_test": both}), bundle.probe, bundle.patches.values())


def scores(
    model: Path, bundle: Bundle, prompts: list[list[int]], dtype: str, device: str, *, batch: int = 1
) -> Float32Array:
    """Logits ``[n]`` of prompts by transformers on a device, ``batch`` of them at a time."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype]).eval().to(device)
    parts: list[torch.Tensor] = [
        read_batch(loaded, bundle.card.sites, prompts[i : i + batch]) for i in range(0, len(prompts), batch)
    ]
    return bundle.logits(torch.cat(parts).float().cpu().numpy())
