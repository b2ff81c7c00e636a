"""Two models under comparison, with their activations in one common basis.

Comparing neuron j of two models, or writing its activation from one into the other, needs the same value
vector (column j of ``down_proj``) in both. Twins that differ by an (IA)³ vector l share their weights, and
the activation that counts is l ⊙ a, after the scale (Chen et al., arXiv 2406.14144). A checkpoint into which
l was folded computes a, and holds l in its columns; the factor is found again by comparing the columns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from guard.locate.errors import LocateError
from guard.locate.hooks import Place, at_inputs
from guard.sites import module_name, shape_of

logger = logging.getLogger(__name__)

TOLERANCE = 2.0**-8
"""Columns are proportional when they differ from a multiple by at most this share: bfloat16's rounding."""


@dataclass(frozen=True, eq=False)
class Twin:
    """One of two models."""

    model: Any
    """A loaded transformers model; two twins may share one."""
    vector: Mapping[int, Tensor] = field(default_factory=dict)
    """(IA)³ factors ``[mlp_width]`` by layer, applied to the input of ``down_proj`` in every pass."""
    folded: Mapping[int, Tensor] = field(default_factory=dict)
    """Factors ``[mlp_width]`` by layer which the columns of ``down_proj`` hold already, relative to the other
    twin: activations are multiplied by them when they are read, not when they are computed."""
    _there: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Factors where and as they were last needed: copied once, not at every token."""

    @contextmanager
    def scaled(self) -> Iterator[None]:
        """Apply the vector to every pass of the block. Enter it before any block that reads."""
        layers = sorted(self.vector)
        places: list[Place] = [(layer, "mlp") for layer in layers]
        with at_inputs(self.model, places, lambda number, seen: self.scale(layers[number], seen)):
            yield

    def scale(self, layer: int, seen: Tensor) -> Tensor:
        """Inputs ``[…, mlp_width]`` of ``down_proj`` times the vector, if there is one for the layer."""
        if layer not in self.vector:
            return seen
        return seen * self._moved("vector", layer, self.vector[layer], seen.device, seen.dtype)

    def common(self, place: Place, seen: Tensor) -> Tensor:
        """Inputs ``[…, width]`` of a site as the other twin's value vectors would need them."""
        layer, kind = place
        if kind != "mlp" or layer not in self.folded:
            return seen
        # In the factor's precision: rounding comes once, where the result is used.
        factor = self.folded[layer]
        return seen * self._moved("folded", layer, factor, seen.device, factor.dtype)

    def _moved(
        self, name: str, layer: int, factor: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        key = (name, layer, device, dtype)
        if key not in self._there:
            self._there[key] = factor.to(device, dtype)
        return self._there[key]


def check_twins(recipient: Twin, donor: Twin) -> None:
    """Raise LocateError unless every unit of one has its counterpart in the other."""
    first, second = (shape_of(twin.model.config) for twin in (recipient, donor))
    widths = [twin.model.config.hidden_size for twin in (recipient, donor)]
    if first != second or widths[0] != widths[1]:
        raise LocateError(
            f"the twins differ in shape: {first} of width {widths[0]} and {second} of width {widths[1]}; "
            "expected two models made from the same base"
        )
    if recipient.folded:
        raise LocateError("the recipient's own value vectors are the basis; only a donor can be folded")
    for name, vectors in (("recipient", recipient.vector), ("donor", donor.vector), ("donor", donor.folded)):
        for layer, factor in vectors.items():
            if not first.first_mlp_layer <= layer < first.layers or factor.shape != (first.mlp_width,):
                raise LocateError(
                    f"the {name}'s vector of layer {layer} has shape {list(factor.shape)}, expected "
                    f"[{first.mlp_width}] at a layer with an MLP site"
                )


def folded_twins(recipient: Any, donor: Any) -> tuple[Twin, Twin]:
    """Twins out of two whole models, with the factors between their value vectors. Raises LocateError.

    Columns that are no multiples of each other are compared as they are, and counted in a log message.
    """
    check_twins(Twin(recipient), Twin(donor))
    shape = shape_of(recipient.config)
    factors: dict[int, Tensor] = {}
    apart = 0
    for layer in range(shape.first_mlp_layer, shape.layers) if shape.mlp_width else ():
        name = module_name(shape.architecture, "mlp", layer)
        ours = recipient.get_submodule(name).weight
        theirs = donor.get_submodule(name).weight.to(ours.device)
        if torch.equal(ours, theirs):
            continue
        factors[layer], different = _factors(ours.detach().double(), theirs.detach().double())
        apart += different
    if apart:
        logger.warning(
            "the value vectors of %d neurons are no multiples of each other in the two models; "
            "their activations are compared as they are",
            apart,
        )
    return Twin(recipient), Twin(donor, folded=factors)


def _factors(ours: Tensor, theirs: Tensor) -> tuple[Tensor, int]:
    """Factors float64 ``[mlp_width]`` by least squares, and how many columns have none; those get 1."""
    power = ours.square().sum(0)
    factor = (ours * theirs).sum(0) / torch.where(power > 0, power, 1.0)
    error = (theirs - ours * factor).square().sum(0)
    proportional = error <= TOLERANCE**2 * theirs.square().sum(0)
    # Where nothing was changed the factor is 1 exactly: both sums are the same.
    factor = torch.where(proportional & (power > 0), factor, 1.0)
    return factor, int((~proportional).sum())


def swapped(recipient: Twin, donor: Twin) -> tuple[Twin, Twin]:
    """The same two models with their roles exchanged. Raises LocateError when a folded factor is zero."""
    if any(bool((factor == 0).any()) for factor in donor.folded.values()):
        raise LocateError("the donor's value vector of a neuron is zero; it cannot be the recipient")
    inverse = {layer: 1.0 / factor for layer, factor in donor.folded.items()}
    return Twin(donor.model, donor.vector), Twin(recipient.model, recipient.vector, inverse)
