"""Which models importance can be measured in, and that others are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guard.locate.errors import LocateError
from guard.locate.importance import ImportanceOptions, locate, tally
from guard.locate.importance_reader import reading, widths
from guard.locate.passes import Cost, forward
from guard.sites import module_name, shape_of
from tests.locate import importance_toys as toys

ALONE = ImportanceOptions(foundation=False)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("family", toys.FAMILIES)
def test_attention_as_transformers_computes_it_is_that_of_the_closed_forms(
    family: str, dtype: torch.dtype, close: float
) -> None:
    model = toys.model(family, attention="eager" if family == "gemma2" else "sdpa").to(dtype)
    with reading(model, [7] * 2, widths(model, ALONE), ALONE) as read:
        forward(model, [toys.PROMPTS[0], toys.PROMPTS[0][::-1]], Cost())
    assert 0 < read.mismatch.max() < close
    locate(model, toys.PROMPTS, ALONE)


@pytest.mark.parametrize(("family", "first"), [("qwen2_moe", 0), ("glm4_moe", 1)])
def test_neurons_of_a_mixture_are_those_of_its_shared_expert(family: str, first: int) -> None:
    model = toys.model(family)
    options = ImportanceOptions(matrices=("mlp", "value"), mlp_active=0.1, foundation=False)
    counted = tally(model, toys.PROMPTS, options)
    shape = shape_of(model.config)
    for number in range(2):
        if number < first:
            assert np.isnan(counted.mean["mlp"][number]).all()
            continue
        expert = model.get_submodule(module_name(shape.architecture, "mlp", number))
        seen: list[torch.Tensor] = []
        handle = expert.register_forward_pre_hook(lambda _m, given, seen=seen: seen.append(given[0]))
        for prompt in toys.PROMPTS:
            model(input_ids=torch.tensor([prompt]))
        handle.remove()
        norms = [x.reshape(-1, shape.mlp_width).norm(dim=0) for x in seen]
        expected = torch.stack(norms).mean(0) * expert.weight.norm(dim=0)
        np.testing.assert_allclose(counted.mean["mlp"][number], expected.numpy(), rtol=1e-10)
    found = locate(model, toys.PROMPTS, options)
    assert not found.selected["mlp"][:first].any()
    assert np.isnan(found.scores["mlp"][:first]).all()
    assert np.nansum(counted.active["mlp"]) == len(toys.PROMPTS) * round(0.1 * 20 * (2 - first))


def test_angles_that_turn_a_part_of_a_head_are_refused_for_queries_and_keys() -> None:
    with pytest.raises(LocateError, match="rotates 2 of 4 columns"):
        locate(toys.model("glm4_moe"), toys.PROMPTS, ALONE)


def test_attention_of_another_form_is_refused() -> None:
    # transformers leaves soft-capping out of this implementation, and so the map is not the capped one.
    model = toys.model("gemma2", attention="sdpa")
    with pytest.raises(LocateError, match="eager"):
        locate(model, toys.PROMPTS, ALONE)
    locate(model, toys.PROMPTS, ImportanceOptions(matrices=("mlp", "value"), foundation=False))


def test_norms_over_all_heads_are_refused_for_queries_and_keys() -> None:
    model = toys.model("llama")
    model.model.layers[0].self_attn.q_norm = torch.nn.RMSNorm(24, dtype=torch.float64)
    with pytest.raises(LocateError, match="normalises all heads"):
        locate(model, toys.PROMPTS, ALONE)
