"""Train some rows and columns of a model's weights and leave every other number exactly as it is.

The trained slices are parameters of their own, put into the weight in the forward pass. Masking gradients
would not do: weight decay moves entries without a gradient, an optimiser's moments outlive a mask, and the
norm that gradients are clipped by would count entries that do not train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from guard.locate.unit_set import Component
from guard.sites import ModelShape, NoSuchSiteError, SiteKind, module_name, shape_of
from guard.tune.errors import TuneError

ChosenUnits = Mapping[Component, Mapping[int, Sequence[int]]]
"""Units by component and layer, as ``UnitSet.units()`` gives them."""
ROWS, COLUMNS = 0, 1


class Part(NamedTuple):
    """Rows or columns of one weight."""

    module: str
    dim: int
    places: list[int]
    """Ascending."""


class _Slices(nn.Module):
    """A weight with some rows, or columns, taken from a parameter."""

    index: Tensor

    def __init__(self, weight: Tensor, dim: int, index: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index.to(weight.device), persistent=False)
        self.slices = nn.Parameter(weight.detach().index_select(dim, self.index).clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight.detach().index_copy(self.dim, self.index, self.slices)


@contextmanager
def training_units(model: Any, units: ChosenUnits, *, gate: bool = False) -> Iterator[list[nn.Parameter]]:
    """Give the parameters to hand to an optimiser: the weights of ``units`` alone; all else is frozen.

    ``mlp``: row of up_proj (with ``gate``, of gate_proj too) and column of down_proj. ``query``, ``key``,
    ``value``: row of that projection. ``attention``: rows of q_proj and columns of o_proj of the head, and
    the key and value rows it shares with its group. ``channel``: column of o_proj and the value row behind
    it. Biases are not trained. Behind the block the model's own weights hold what was learnt.
    Raises TuneError.
    """
    with _sliced(model, parts_of(model, units, gate=gate)) as slices:
        yield slices


@contextmanager
def freezing_units(model: Any, units: ChosenUnits, *, gate: bool = True) -> Iterator[list[nn.Parameter]]:
    """The reverse: give every parameter of the model but the weights of ``units``. Raises TuneError."""
    parts = []
    for module, dim, index in parts_of(model, units, gate=gate):
        taken = set(index)
        size = model.get_submodule(module).weight.shape[dim]
        parts.append(Part(module, dim, [i for i in range(size) if i not in taken]))
    sliced = {f"{part.module}.weight" for part in parts}
    # Biases of frozen rows would move their outputs; they stay as they are.
    sliced |= {f"{part.module}.bias" for part in parts if part.dim == ROWS}
    others = [parameter for name, parameter in model.named_parameters() if name not in sliced]
    with _sliced(model, parts) as slices:
        for parameter in others:
            parameter.requires_grad_(True)
        yield [*slices, *others]


@contextmanager
def _sliced(model: Any, parts: Sequence[Part]) -> Iterator[list[nn.Parameter]]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    made: list[tuple[Any, _Slices]] = []
    try:
        for name, dim, index in parts:
            module = model.get_submodule(name)
            slices = _Slices(module.weight, dim, torch.tensor(index, dtype=torch.long))
            # Unsafe skips a trial call of the forward, which is cheap here and known to fit.
            parametrize.register_parametrization(module, "weight", slices, unsafe=True)
            made.append((module, slices))
        yield [slices.slices for _, slices in made]
    finally:
        for module, slices in made:
            weight = module.parametrizations.weight.original
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            with torch.no_grad():
                weight.index_copy_(slices.dim, slices.index, slices.slices.to(weight.dtype))
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
            parameter.grad = None


def parts_of(model: Any, units: ChosenUnits, *, gate: bool) -> list[Part]:
    """Rows and columns of the weights that the units are made of, each weight once. Raises TuneError."""
    shape = shape_of(model.config)
    groups = getattr(model.config, "num_key_value_heads", None) or shape.heads
    found: dict[tuple[str, int], set[int]] = {}
    for component, by_layer in units.items():
        for layer, chosen in by_layer.items():
            kind: SiteKind = "mlp" if component == "mlp" else "attention"
            try:
                shape.check(kind, layer)
            except NoSuchSiteError as error:
                raise TuneError(str(error)) from error
            block = module_name(shape.architecture, kind, layer).rpartition(".")[0]
            for name, dim, index in _weights(shape, groups, component, list(chosen), gate):
                found.setdefault((f"{block}.{name}", dim), set()).update(index)
    parts = [Part(name, dim, sorted(index)) for (name, dim), index in found.items() if index]
    if not parts:
        raise TuneError("there is no unit; expected at least one")
    for name, dim, index in parts:
        try:
            size = model.get_submodule(name).weight.shape[dim]
        except AttributeError as error:
            raise TuneError(f"there is no {name} whose weight could be trained in part: {error}") from error
        if index[0] < 0 or index[-1] >= size:
            what = "rows" if dim == ROWS else "columns"
            raise TuneError(f"{name} has {size} {what}; got {index[0]} to {index[-1]}")
    return parts


def _weights(
    shape: ModelShape, groups: int, component: Component, units: list[int], gate: bool
) -> list[tuple[str, int, list[int]]]:
    if component == "mlp":
        rows = ["up_proj", "gate_proj"] if gate else ["up_proj"]
        return [*((name, ROWS, units) for name in rows), ("down_proj", COLUMNS, units)]
    if component == "attention":
        columns = shape.columns("attention", tuple(units))
        shared = _shared_rows(shape, groups, columns)
        return [
            ("q_proj", ROWS, columns),
            ("k_proj", ROWS, shared),
            ("v_proj", ROWS, shared),
            ("o_proj", COLUMNS, columns),
        ]
    if component == "channel":
        return [("v_proj", ROWS, _shared_rows(shape, groups, units)), ("o_proj", COLUMNS, units)]
    return [(f"{component[0]}_proj", ROWS, units)]


def _shared_rows(shape: ModelShape, groups: int, columns: list[int]) -> list[int]:
    """Key and value rows behind columns of all heads side by side: ``(h // R) * D + c``."""
    per_group = shape.heads // groups
    return [
        column // shape.head_dim // per_group * shape.head_dim + column % shape.head_dim for column in columns
    ]
