from __future__ import annotations

import pytest

from guard.sites import ModelShape, UnsupportedArchitectureError, module_name, shape_of
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
    with pytest.raises(UnsupportedArchitectureError, match="'MixtralForCausalLM' are; supported: Llama"):
        shape_of(config)
