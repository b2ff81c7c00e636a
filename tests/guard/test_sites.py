from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from guard.sites import MODULES, ModelShape, UnsupportedArchitectureError, module_name, shape_of
from tests.engine import architectures
from tests.guard import worlds


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
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **architectures.SIZES[kind]))
    model.config.architectures = [type(model).__name__]
    shape = shape_of(model.config)
    assert (shape.architecture, shape.layers, shape.heads) == (architecture, 4, 4)
    for layer in range(shape.layers):
        mlp = model.get_submodule(module_name(architecture, "mlp", layer))
        attention = model.get_submodule(module_name(architecture, "attention", layer))
        assert isinstance(mlp, nn.Linear)
        assert isinstance(attention, nn.Linear)
        assert mlp.in_features == shape.width("mlp") == 176
        assert attention.in_features == shape.width("attention") == attention_width


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
    config.architectures = ["MixtralForCausalLM"]
    with pytest.raises(UnsupportedArchitectureError, match="'MixtralForCausalLM' are; supported: Gemma2"):
        shape_of(config)
