"""Switch units off by hooks while a block runs; the model's weights are not touched.

``mlp``: the neuron's activation becomes zero, which is the same as zeroing row j of up_proj or column j of
down_proj. ``query``, ``key``, ``value``: the row's output, its bias included. ``attention`` and ``channel``:
columns of the input of o_proj.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from guard.locate.errors import LocateError
from guard.locate.unit_set import Component
from guard.sites import ModelShape, SiteKind, module_name, shape_of


@contextmanager
def deactivated(model: Any, units: Mapping[Component, Mapping[int, Sequence[int]]]) -> Iterator[None]:
    """Run the block without ``units``, given as ``UnitSet.units()`` gives them. Raises LocateError."""
    shape = shape_of(model.config)
    with ExitStack() as hooks:
        for component, by_layer in units.items():
            for layer, chosen in by_layer.items():
                hooks.callback(_switch_off(model, shape, component, layer, list(chosen)).remove)
        yield


def _switch_off(model: Any, shape: ModelShape, component: Component, layer: int, units: list[int]) -> Any:
    kind: SiteKind = "mlp" if component == "mlp" else "attention"
    if kind == "mlp":
        shape.check("mlp", layer)
    name = module_name(shape.architecture, kind, layer)
    rows = component in ("query", "key", "value")
    if rows:
        name = f"{name.rpartition('.')[0]}.{component[0]}_proj"
    if component == "attention":
        units = shape.columns("attention", tuple(units))
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise LocateError(f"there is no {name} to switch {component} units off in: {error}") from error
    width = module.weight.shape[0 if rows else 1]
    if not units or min(units) < 0 or max(units) >= width:
        raise LocateError(f"{name} has units 0 to {width - 1}; got {units}")
    index = torch.tensor(units)

    def zeroed(tensor: Tensor) -> Tensor:
        return tensor.index_fill(-1, index.to(tensor.device), 0.0)

    if rows:
        return module.register_forward_hook(lambda _module, _inputs, output: zeroed(output))
    return module.register_forward_pre_hook(lambda _module, inputs: (zeroed(inputs[0]), *inputs[1:]))
