"""A model that `accelerate` has spread by a map of devices gives what it gives in one piece.

On the CPU all places of the map are one device, but every module runs behind accelerate's own forward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch

from guard.checkpoint import Checkpoint
from guard.locate import capacity, contrast, heads, importance
from guard.locate.patching import dap_generate
from guard.locate.results import Scores
from guard.locate.twins import Twin
from tests.guard import worlds
from tests.locate import contrast_toys as toys

PROMPTS, OTHERS = toys.prompts(6), toys.prompts(5, seed=1)


def spread(made: Any) -> Any:
    """The model behind accelerate's hooks, layer by layer."""
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{layer}": "cpu" for layer in range(toys.LAYERS)}
    found = accelerate.dispatch_model(made, places, force_hooks=True)
    assert "_old_forward" in vars(found.model.layers[0].self_attn)
    return found


def scores(method: str, made: Any) -> Scores:
    if method == "contrast":
        twins = Twin(made), Twin(made, toys.vector())
        return contrast.locate(*twins, PROMPTS, contrast.ContrastOptions(new_tokens=5))
    if method == "heads":
        return heads.locate(made, PROMPTS, heads.HeadsOptions(count=2))
    if method == "importance":
        return importance.locate(made, PROMPTS, importance.ImportanceOptions(), foundation=OTHERS)
    return capacity.locate(made, PROMPTS, OTHERS, capacity.CapacityOptions())


@pytest.mark.parametrize("method", ["capacity", "contrast", "heads", "importance"])
def test_scores_are_those_of_the_model_in_one_piece(method: str) -> None:
    whole, parts = scores(method, toys.model()), scores(method, spread(toys.model()))
    for name in whole.scores:
        np.testing.assert_array_equal(parts.scores[name], whole.scores[name])
        np.testing.assert_array_equal(parts.selected[name], whole.selected[name])


def test_a_checkpoint_is_spread_while_it_is_loaded(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(worlds.checkpoint(tmp_path, worlds.model()))
    whole, parts = checkpoint.load_model(), checkpoint.load_model(device="auto")
    assert not any(weight.requires_grad for weight in parts.parameters())
    with torch.inference_mode():
        ids = torch.tensor([PROMPTS[0]])
        assert torch.equal(parts(ids).logits, whole(ids).logits)


def test_patched_answers_are_those_of_the_model_in_one_piece() -> None:
    answers = []
    for made in (toys.model(), spread(toys.model())):
        twins = Twin(made), Twin(made, toys.vector())
        answers.append(dap_generate(*twins, toys.sites(toys.PLANTED), PROMPTS, new_tokens=5))
    assert answers[0] == answers[1]
