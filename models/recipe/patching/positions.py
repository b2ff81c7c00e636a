"""Dynamic patching at some tokens only: what the engine does not do, to learn which tokens matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from guard.locate.decoding import Decoding, Step, generate
from guard.locate.hooks import Columns, Place, at_inputs
from guard.locate.twins import Twin
from guard.prompts import Tokens
from guard.sites import shape_of
from guard.units import Units

Reach = Literal["all", "prompt", "last", "answer"]
"""Which tokens are patched: every one, those of the prompt, its last alone, or those of the answer, the last
of the prompt being where the answer's first comes from."""


def reaching(
    recipient: Twin,
    donor: Twin,
    units: Units,
    prompts: Sequence[Tokens],
    reach: Reach,
    new_tokens: int,
    batch_tokens: int,
) -> list[Tokens]:
    """Greedy answers of twins of one model, patched at some tokens; as ``dap_generate`` otherwise."""
    return generate(
        lambda: _step(recipient, donor, units, reach),
        recipient.model,
        prompts,
        new_tokens=new_tokens,
        batch_tokens=batch_tokens,
    )


def _step(recipient: Twin, donor: Twin, units: Units, reach: Reach) -> Step:
    shape = shape_of(recipient.model.config)
    columns = Columns(units, shape)
    number_of = {(site.layer, site.kind): number for number, site in enumerate(units)}
    vectors: set[Place] = {(layer, "mlp") for layer in donor.vector}
    places = sorted(vectors | number_of.keys())
    decoding, begun = Decoding(recipient.model), False

    def edit(number: int, seen: Tensor) -> Tensor:
        ours, theirs = seen.chunk(2)
        theirs = donor.scale(places[number][0], theirs)
        if places[number] in number_of:
            chosen = columns.at(number_of[places[number]], seen.device)
            whole = ours.index_copy(-1, chosen, theirs.index_select(-1, chosen))
            if not begun:
                first = 0 if reach in ("all", "prompt") else whole.shape[1] - 1
                ours = torch.cat([ours[:, :first], whole[:, first:]], dim=1)
            elif reach in ("all", "answer"):
                ours = whole
        return torch.cat([ours, theirs])

    def step(ids: Tensor, mask: Tensor) -> Tensor:
        nonlocal begun
        with at_inputs(recipient.model, places, edit):
            logits = decoding.feed(torch.cat([ids, ids]), torch.cat([mask, mask]))
        begun = True
        assert logits is not None
        return logits[: len(ids)]

    return step
