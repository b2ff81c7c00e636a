"""How much each neuron's patch contributes: the gradient of the aligned answer with respect to gates.

Each neuron has a gate g that mixes its activation in recipient and donor, a + g · (d − a): 0 is the
recipient, 1 is patched. With d read once from the donor on the same text, the mean log-probability F(g) of
the donor's answers is a function of all gates, and its gradient is to first order what opening each would
add, over all positions: attribution patching (Syed et al., arXiv 2310.10348). Along the straight path from
all closed to all open the mean gradients sum to F(1) − F(0), as integrated gradients do (Sundararajan et al.,
arXiv 1703.01365).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.capture import batches, pad
from guard.locate.change import Text
from guard.locate.errors import LocateError
from guard.locate.hooks import Place, at_inputs
from guard.locate.sweep import answer_log_probs, last_logits
from guard.locate.twins import Twin, check_twins
from guard.sites import shape_of

Table = NDArray[np.float64]


def gradient(
    recipient: Twin, donor: Twin, texts: Sequence[Text], gates: Table, *, batch_tokens: int = 2048
) -> tuple[Table, float]:
    """Gradient ``[layers, mlp_width]`` of the mean log-probability of the answers, and its value in nats.

    ``texts`` are prompts with the donor's answers. Raises LocateError.
    """
    check_twins(recipient, donor)
    if not texts or not all(prompt and answer for prompt, answer in texts):
        raise LocateError("expected texts of a prompt and an answer, none of them empty")
    shape = shape_of(recipient.model.config)
    places: list[Place] = [(layer, "mlp") for layer in range(shape.first_mlp_layer, shape.layers)]
    opened = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
    slope, value = torch.zeros_like(opened), 0.0
    for group in batches([len(prompt) + len(answer) for prompt, answer in texts], tokens=batch_tokens):
        part = [texts[i] for i in group]
        ids, mask, _ = pad([prompt + answer for prompt, answer in part])
        held: list[Tensor] = []

        def read(number: int, seen: Tensor, held: list[Tensor] = held) -> None:
            held.append(donor.common(places[number], seen))

        def mix(number: int, seen: Tensor, held: list[Tensor] = held) -> Tensor:
            return seen + opened[places[number][0]].to(seen) * (held[number] - seen)

        with torch.no_grad(), donor.scaled(), at_inputs(donor.model, places, read):
            last_logits(donor.model, ids, mask, 1)
        keep = ids.shape[1] - min(len(prompt) for prompt, _ in part) + 1
        with recipient.scaled(), at_inputs(recipient.model, places, mix):
            total = answer_log_probs(last_logits(recipient.model, ids, mask, keep), part, ids).sum()
        slope += torch.autograd.grad(total, opened)[0]
        value += float(total.detach())
    return (slope / len(texts)).numpy(), value / len(texts)


def path(recipient: Twin, donor: Twin, texts: Sequence[Text], *, steps: int = 4) -> Table:
    """Mean gradient along the path from no gate open to all, by the midpoint rule."""
    shape = shape_of(recipient.model.config)
    whole = np.ones((shape.layers, shape.mlp_width))
    found = [gradient(recipient, donor, texts, whole * (i + 0.5) / steps)[0] for i in range(steps)]
    return np.asarray(np.mean(found, axis=0))


def greedy_by_gradient(
    recipient: Twin, donor: Twin, texts: Sequence[Text], candidates: NDArray[np.bool_], counts: Sequence[int]
) -> Table:
    """A ranking made in blocks: the gradient is taken again after each block has been opened.

    ``counts`` are the ascending numbers of units after each block. Scores ``[layers, mlp_width]`` fall from
    block to block; units that were never taken rank by the last gradient, below all others.
    """
    opened = np.zeros(candidates.shape)
    scores = np.full(candidates.shape, -np.inf)
    for number, count in enumerate(counts):
        slope, _ = gradient(recipient, donor, texts, opened)
        left = np.where(candidates & (opened == 0), slope, -np.inf)
        best = np.argsort(-left, axis=None, kind="stable")[: count - int(opened.sum())]
        # Ranks stand for scores: slopes of different blocks have nothing to do with each other.
        scores.flat[best] = -number - np.arange(len(best)) / len(best)
        opened.flat[best] = 1.0
    rest = candidates & (opened == 0)
    order = np.argsort(-np.where(rest, slope, -np.inf), axis=None, kind="stable")[: int(rest.sum())]
    scores.flat[order] = -len(counts) - np.arange(len(order)) / max(len(order), 1)
    return scores


def table_shape(twin: Twin) -> tuple[int, int]:
    """Layers and neurons of a layer: the shape of gates and rankings."""
    shape = shape_of(twin.model.config)
    return shape.layers, shape.mlp_width
