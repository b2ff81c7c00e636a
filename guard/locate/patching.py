"""Dynamic activation patching (Chen et al., arXiv 2406.14144, section 3): answer with borrowed activations.

At each step the donor reads the recipient's text, and some units of the recipient take the donor's
activations, at every position of that step: the whole prompt first, then each new token. The next token is
the recipient's. The donor's cache holds unpatched passes; the recipient's holds the effect of the patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from guard.bundle import Site
from guard.locate.decoding import Decoding, Step, generate, plain
from guard.locate.errors import LocateError
from guard.locate.hooks import Columns, Place, at_inputs
from guard.locate.twins import Twin, check_twins
from guard.locate.unit_set import UnitSet
from guard.prompts import Tokens
from guard.sites import ModelShape, SiteKind, shape_of
from guard.units import Units, ordered


def units_of(selected: UnitSet, shape: ModelShape) -> Units:
    """The selected units as sites; an empty selection is no site. Raises LocateError."""
    sites = []
    for component, layers in selected.units().items():
        if component not in ("mlp", "attention"):
            raise LocateError(
                f"units of {component!r} cannot be patched; expected MLP neurons or attention heads"
            )
        kind: SiteKind = "mlp" if component == "mlp" else "attention"
        for layer, units in layers.items():
            if layer >= shape.layers or units[-1] >= shape.units(kind):
                raise LocateError(
                    f"{kind} unit {units[-1]} of layer {layer} does not exist in this {shape.architecture}; "
                    "the units were located in another model"
                )
            sites.append(Site(layer=layer, kind=kind, units=tuple(units)))
    return ordered(sites)


class Patch:
    """Activations of some units on their way from the donor to the recipient."""

    def __init__(self, recipient: Twin, donor: Twin, units: Units) -> None:
        shape = shape_of(recipient.model.config)
        self._recipient, self._donor = recipient, donor
        self._places: list[Place] = [(site.layer, site.kind) for site in units]
        self._columns = Columns(units, shape)
        self._taken: dict[int, Tensor] = {}

    @contextmanager
    def taking(self) -> Iterator[None]:
        """The donor's passes of the block are read."""

        def take(number: int, seen: Tensor) -> None:
            chosen = self._columns.at(number, seen.device)
            self._taken[number] = self._donor.common(self._places[number], seen).index_select(-1, chosen)

        with self._donor.scaled(), at_inputs(self._donor.model, self._places, take):
            yield

    @contextmanager
    def giving(self) -> Iterator[None]:
        """The recipient's pass of the block, on the tokens the donor read last, uses what was read."""

        def give(number: int, seen: Tensor) -> Tensor:
            chosen = self._columns.at(number, seen.device)
            return seen.index_copy(-1, chosen, self._taken.pop(number).to(seen))

        with self._recipient.scaled(), at_inputs(self._recipient.model, self._places, give):
            yield


def two_caches(recipient: Twin, donor: Twin, units: Units) -> Step:
    """The patching step of two models, each with a cache of its own."""
    patch = Patch(recipient, donor, units)
    ours, theirs = Decoding(recipient.model), Decoding(donor.model)

    def step(ids: Tensor, mask: Tensor) -> Tensor:
        with patch.taking():
            theirs.feed(ids, mask, logits=False)
        with patch.giving():
            logits = ours.feed(ids, mask)
        assert logits is not None  # noqa: S101 (asked for)
        return logits

    return step


def one_batch(recipient: Twin, donor: Twin, units: Units) -> Step:
    """The same for twins of one model: rows of the recipient, then as many of the donor, in one pass."""
    shape = shape_of(recipient.model.config)
    decoding, columns = Decoding(recipient.model), Columns(units, shape)
    number_of = {(site.layer, site.kind): number for number, site in enumerate(units)}
    vectors: set[Place] = {(layer, "mlp") for twin in (recipient, donor) for layer in twin.vector}
    places = sorted(vectors | number_of.keys())

    def edit(number: int, seen: Tensor) -> Tensor:
        place = places[number]
        ours, theirs = seen.chunk(2)
        if place[1] == "mlp":
            ours, theirs = recipient.scale(place[0], ours), donor.scale(place[0], theirs)
        if place in number_of:
            chosen = columns.at(number_of[place], seen.device)
            ours = ours.index_copy(-1, chosen, theirs.index_select(-1, chosen))
        return torch.cat([ours, theirs])

    def step(ids: Tensor, mask: Tensor) -> Tensor:
        with at_inputs(recipient.model, places, edit):
            logits = decoding.feed(torch.cat([ids, ids]), torch.cat([mask, mask]))
        assert logits is not None  # noqa: S101 (asked for)
        return logits[: len(ids)]

    return step


def dap_generate(
    recipient: Twin,
    donor: Twin,
    units: Units,
    prompts: Sequence[Tokens],
    *,
    new_tokens: int = 128,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> list[Tokens]:
    """Greedy answers of the recipient with ``units`` patched from the donor. Raises LocateError.

    Twins that share one model run as one batch of twice the rows. Answers are exact token ids, in the order
    of the prompts, without the end-of-sequence token.
    """
    check_twins(recipient, donor)
    if not units:
        return generate(
            lambda: plain(recipient),
            recipient.model,
            prompts,
            new_tokens=new_tokens,
            batch_tokens=batch_tokens,
            name="answers (nothing patched)",
            progress=progress,
        )
    shared = recipient.model is donor.model and not donor.folded
    make = one_batch if shared else two_caches
    return generate(
        lambda: make(recipient, donor, units),
        recipient.model,
        prompts,
        new_tokens=new_tokens,
        # Two rows a prompt, or two caches: the same memory as one model with half the tokens.
        batch_tokens=max(batch_tokens // 2, 1),
        name="answers (patched)",
        progress=progress,
    )
