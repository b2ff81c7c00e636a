from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from guard.sites import (
    MODULES,
    ModelShape,
    NoSuchSiteError,
    UnsupportedArchitectureError,
    module_name,
    shape_of,
)
from guard.units import every_neuron
from tests.engine import architectures
from tests.guard import worlds


def on_meta(kind: str, **changes: Any) -> Any:
    """A further architecture without memory for its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **{**architectures.SIZES[kind], **changes})
        )
    model.config.architectures = [type(model).__name__]
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_sites_are_linear_layers_of_the_model_with_the_width_that_is_claimed(kind: str) -> None:
    model = worlds.model(kind)
    shape = shape_of(model.config)
    for layer in range(shape.layers):
        mlp = model.get_submodule(module_name(shape.architecture, "mlp", layer))
        attention = model.get_submodule(module_name(shape.architecture, "attention", layer))
        assert mlp.in_features == shape.width("mlp") == 48
        assert attention.in_features == shape.width("attention") == 32


@pytest.mark.parametrize(
    ("kind", "architecture", "attention_width"),
    [
        ("gemma2", "Gemma2ForCausalLM", 256),
        ("gemma3_text", "Gemma3ForCausalLM", 256),
        ("mistral", "MistralForCausalLM", 256),
        ("olmo2", "Olmo2ForCausalLM", 128),
        ("phi3", "Phi3ForCausalLM", 128),
        ("qwen2", "Qwen2ForCausalLM", 128),
    ],
)
def test_further_architectures_have_the_modules_and_widths_that_are_claimed(
    kind: str, architecture: str, attention_width: int
) -> None:
    model = on_meta(kind)
    shape = shape_of(model.config)
    assert (shape.architecture, shape.layers, shape.heads) == (architecture, 4, 4)
    for layer in range(shape.layers):
        mlp = model.get_submodule(module_name(architecture, "mlp", layer))
        attention = model.get_submodule(module_name(architecture, "attention", layer))
        assert isinstance(mlp, nn.Linear)
        assert isinstance(attention, nn.Linear)
        assert mlp.in_features == shape.width("mlp") == 176
        assert attention.in_features == shape.width("attention") == attention_width


@pytest.mark.parametrize(
    ("kind", "architecture", "first", "mlp"),
    [
        ("glm4_moe", "Glm4MoeForCausalLM", 1, "shared_experts"),
        ("mixtral", "MixtralForCausalLM", 0, None),
        ("olmoe", "OlmoeForCausalLM", 0, None),
        ("qwen2_moe", "Qwen2MoeForCausalLM", 0, "shared_expert"),
        ("qwen3_moe", "Qwen3MoeForCausalLM", 0, None),
    ],
)
def test_mixtures_of_experts_have_the_modules_and_widths_that_are_claimed(
    kind: str, architecture: str, first: int, mlp: str | None
) -> None:
    model = on_meta(kind)
    shape = shape_of(model.config)
    assert (shape.architecture, shape.layers, shape.first_mlp_layer) == (architecture, 4, first)
    for layer in range(shape.layers):
        attention = model.get_submodule(module_name(architecture, "attention", layer))
        assert isinstance(attention, nn.Linear)
        assert attention.in_features == shape.width("attention")
    if mlp is None:
        assert shape.mlp_width == 0
        return
    for layer in range(first, shape.layers):
        name = module_name(architecture, "mlp", layer)
        found = model.get_submodule(name)
        assert isinstance(found, nn.Linear)
        assert (found.in_features, name.split(".")[-2]) == (shape.width("mlp"), mlp)


@pytest.mark.parametrize("kind", architectures.ROUTED)
def test_routed_experts_are_no_sites(kind: str) -> None:
    shape = shape_of(on_meta(kind).config)
    for refused in (shape.units, shape.width):
        with pytest.raises(NoSuchSiteError, match="routed experts"):
            refused("mlp")
    with pytest.raises(NoSuchSiteError, match="units file such as"):
        every_neuron(shape)
    shape.check("attention", 0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2_moe", {"mlp_only_layers": [2]}),
        ("qwen2_moe", {"decoder_sparse_step": 3}),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2, 3]}),
        ("glm4_moe", {"first_k_dense_replace": 4}),
    ],
)
def test_layers_that_are_not_alike_leave_attention_sites_only(kind: str, changes: dict[str, Any]) -> None:
    shape = shape_of(on_meta(kind, **changes).config)
    assert shape.mlp_width == 0
    assert shape.units("attention") == 4


def test_dense_layers_below_the_shared_experts_have_no_mlp_site() -> None:
    shape = shape_of(on_meta("glm4_moe").config)
    assert [site.layer for site in every_neuron(shape)] == [1, 2, 3]
    shape.check("attention", 0)
    shape.check("mlp", 1)
    with pytest.raises(NoSuchSiteError, match="begin at layer 1"):
        shape.check("mlp", 0)
    skipping = shape_of(on_meta("qwen2_moe", mlp_only_layers=[0, 1]).config)
    assert skipping.first_mlp_layer == 2


def test_every_architecture_listed_is_tried() -> None:
    kinds = ["llama", "qwen3", *map(architectures.model_type, architectures.SIZES)]
    tried = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] for kind in kinds}
    assert tried == MODULES.keys()


def test_a_head_is_a_run_of_columns() -> None:
    shape = ModelShape("LlamaForCausalLM", 2, 10, heads=4, head_dim=3)
    assert shape.columns("attention", (0, 2)) == [0, 1, 2, 6, 7, 8]
    assert shape.columns("mlp", (4, 9)) == [4, 9]
    assert (shape.units("attention"), shape.units("mlp")) == (4, 10)


def test_head_width_is_derived_when_the_configuration_does_not_give_it() -> None:
    config = worlds.model().config
    config.head_dim = None
    assert shape_of(config).head_dim == 32 // 4


def test_an_unknown_layout_is_refused_by_name() -> None:
    config = worlds.model().config
    config.architectures = ["DeepseekV3ForCausalLM"]
    with pytest.raises(UnsupportedArchitectureError, match="'DeepseekV3ForCausalLM' are; supported: Gemma2"):
        shape_of(config)
