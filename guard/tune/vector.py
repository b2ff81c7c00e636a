"""An (IA)³ vector that trains: factors on the columns of ``down_proj``, everything else as it is.

W (l ⊙ a) = (W diag(l)) a, so the factors are put on the weight's columns, as ``guard.ia3`` folds them. Only
the factors that may differ from 1 are parameters, as deviations from 1: momentum moves no other one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from guard.ia3 import VECTOR_NAME
from guard.sites import module_name, shape_of
from guard.tune.errors import TuneError


class _Scaled(nn.Module):
    """A weight whose columns are scaled."""

    index: Tensor

    def __init__(self, weight: Tensor, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index.to(weight.device), persistent=False)
        self.deviation = nn.Parameter(torch.zeros(len(index), dtype=torch.float32, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.detach() * self.factors(weight.shape[1]).to(weight.dtype)

    def factors(self, width: int) -> Tensor:
        """The vector, float32 ``[width]``."""
        return torch.ones(width, device=self.deviation.device).index_add(0, self.index, self.deviation)


@contextmanager
def training_vector(
    model: Any, units: Mapping[int, Sequence[int]] | None = None, *, last_layers: int = 1
) -> Iterator[dict[str, Tensor]]:
    """Train (IA)³ factors of the neurons ``units`` by layer, or of all but those of the last layers.

    Gives a dictionary that holds the vector's tensors behind the block, float32 ``[mlp_width]`` by the name
    that ``guard.ia3`` reads; they are then folded into the model's weights. Raises TuneError.
    """
    shape = shape_of(model.config)
    if not shape.mlp_width:
        raise TuneError(f"{shape.architecture} has no MLP sites, so that there is nothing to put a vector on")
    if units is None:
        layers = range(shape.first_mlp_layer, shape.layers - last_layers)
        units = {layer: range(shape.mlp_width) for layer in layers}
    if not any(map(len, units.values())):
        raise TuneError("there is no neuron to train a factor of; expected at least one")
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    made: dict[int, tuple[Any, _Scaled]] = {}
    found: dict[str, Tensor] = {}
    try:
        for layer, chosen in units.items():
            outside = min(chosen) < 0 or max(chosen) >= shape.mlp_width
            if outside or not shape.first_mlp_layer <= layer < shape.layers:
                raise TuneError(
                    f"layer {layer} has no such neurons; there are {shape.mlp_width} in each layer from "
                    f"{shape.first_mlp_layer} to {shape.layers - 1}"
                )
            module: Any = model.get_submodule(module_name(shape.architecture, "mlp", layer))
            scaled = _Scaled(module.weight, torch.tensor(sorted(chosen), dtype=torch.long))
            parametrize.register_parametrization(module, "weight", scaled, unsafe=True)
            made[layer] = module, scaled
        yield found
    finally:
        for layer, (module, scaled) in made.items():
            weight = module.parametrizations.weight.original
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            with torch.no_grad():
                factors = scaled.factors(shape.mlp_width)
                weight.mul_(factors.to(weight.dtype))
            found[VECTOR_NAME.format(layer=layer)] = factors.detach().cpu()
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
            parameter.grad = None
