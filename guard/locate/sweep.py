"""How many units are needed? Patch nested sets while the donor's own answers are read, not written.

Free generation diverges with each set, so that every set needs a donor of its own. Here the text is fixed:
one pass of the donor serves all sets, and the score is the log-probability of the donor's answer under the
patched recipient. It stands in for the causal effect; confirm the few sets that matter by generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from guard.bundle import Site
from guard.capture import batches, pad
from guard.locate.change import Text
from guard.locate.errors import LocateError
from guard.locate.hooks import Place, at_inputs
from guard.locate.twins import Twin, check_twins
from guard.sites import ModelShape, shape_of
from guard.units import Units, union


@torch.inference_mode()
def sweep(
    recipient: Twin,
    donor: Twin,
    sets: Sequence[Units],
    texts: Sequence[Text],
    *,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> NDArray[np.float64]:
    """Log-probabilities, in nats, ``[sets, texts]`` of each answer under the recipient with each set patched.

    ``texts`` are prompts and the donor's answers to them; an empty set leaves the recipient alone. Raises
    LocateError.
    """
    check_twins(recipient, donor)
    if not texts or not all(prompt and answer for prompt, answer in texts):
        raise LocateError("expected texts of a prompt and an answer, none of them empty")
    shape = shape_of(recipient.model.config)
    everything = union(sets)
    result = np.empty((len(sets), len(texts)))
    lengths = [len(prompt) + len(answer) for prompt, answer in texts]
    for group in tqdm(batches(lengths, tokens=batch_tokens), "sets of units", disable=not progress):
        part = [texts[i] for i in group]
        ids, mask, _ = pad([prompt + answer for prompt, answer in part])
        held: dict[Place, Tensor] = {}
        with donor.scaled(), _reading(donor, everything, held):
            last_logits(donor.model, ids, mask, 1)
        keep = ids.shape[1] - min(len(prompt) for prompt, _ in part) + 1
        for number, units in enumerate(sets):
            with recipient.scaled(), _writing(recipient, units, held, shape):
                logits = last_logits(recipient.model, ids, mask, keep)
            result[number, group] = answer_log_probs(logits, part, ids).tolist()
    return result


@torch.inference_mode()
def log_probabilities(twin: Twin, texts: Sequence[Text], *, batch_tokens: int = 4096) -> NDArray[np.float64]:
    """Log-probability of each answer under a model that is left alone, in nats, ``[texts]``."""
    result = np.empty(len(texts))
    for group in batches([len(prompt) + len(answer) for prompt, answer in texts], tokens=batch_tokens):
        part = [texts[i] for i in group]
        ids, mask, _ = pad([prompt + answer for prompt, answer in part])
        keep = ids.shape[1] - min(len(prompt) for prompt, _ in part) + 1
        with twin.scaled():
            result[group] = answer_log_probs(last_logits(twin.model, ids, mask, keep), part, ids).tolist()
    return result


@contextmanager
def _reading(donor: Twin, units: Units, held: dict[Place, Tensor]) -> Iterator[None]:
    places: list[Place] = [(site.layer, site.kind) for site in units]

    def read(number: int, seen: Tensor) -> None:
        held[places[number]] = donor.common(places[number], seen)

    with at_inputs(donor.model, places, read):
        yield


@contextmanager
def _writing(recipient: Twin, units: Units, held: dict[Place, Tensor], shape: ModelShape) -> Iterator[None]:
    def write(number: int, seen: Tensor) -> Tensor:
        site: Site = units[number]
        columns = torch.tensor(shape.columns(site.kind, site.units), device=seen.device)
        given = held[site.layer, site.kind].to(seen)
        return seen.index_copy(-1, columns, given.index_select(-1, columns))

    with at_inputs(recipient.model, [(site.layer, site.kind) for site in units], write):
        yield


def last_logits(model: Any, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    """Logits ``[batch, keep, vocabulary]`` of the last columns."""
    device = model.device
    logits: Tensor = model(
        input_ids=ids.to(device),
        attention_mask=None if bool(mask.all()) else mask.to(device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
        use_cache=False,
        logits_to_keep=keep,
    ).logits
    return logits


def answer_log_probs(logits: Tensor, texts: Sequence[Text], ids: Tensor) -> Tensor:
    """Log-probability of each answer, float64 ``[texts]``, out of the logits of the last columns."""
    begin = ids.shape[1] - logits.shape[1]
    found = []
    for row, (prompt, answer) in enumerate(texts):
        first = len(prompt) - 1 - begin
        predicted = logits[row, first : first + len(answer)].double().log_softmax(-1)
        said = torch.tensor(answer, device=predicted.device)
        found.append(predicted.gather(-1, said[:, None]).sum())
    return torch.stack(found)
