"""How much a model changes when a head is ablated: the safety head importance scores (Ships) of Zhou et al.

For one query: the divergence of next-token distributions. For a set of queries: the angle by which the
dominant directions of their final states turn. All in float64: ``arccos`` of a float32 cosine is 0 for the
small turns that most heads cause.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]
"""``left``: directions in query space, as the paper's code takes them; a rotation of all states alike does
not show. ``right``: directions of the states themselves."""


def divergence(vanilla: Tensor, ablated: Tensor) -> Tensor:
    """KL(vanilla ‖ ablated) in nats, float64 ``[..., n]``, of logits ``[n, vocabulary]`` and ``[..., n, …]``.

    The paper's code adds 1e-12 to both probabilities; log-softmax needs no such guard.
    """
    before, after = vanilla.double().log_softmax(-1), ablated.double().log_softmax(-1)
    # Rounding may leave a sum of exact zeros a hair below zero.
    return (before.exp() * (before - after)).sum(-1).clamp(min=0.0)


def subspace(states: Tensor, rank: int = 1, side: Side = "left") -> Tensor:
    """Orthonormal float64 basis ``[..., n or width, rank]`` of the leading singular vectors.

    ``states`` are ``[..., n, width]``, a row a query. From the Gram matrix ``[n, n]``; nothing of the size
    ``width × width`` is ever made.
    """
    matrix = states.double()
    _, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    left = vectors[..., -rank:].flip(-1)
    basis: Tensor = left if side == "left" else torch.linalg.qr(matrix.mT @ left).Q
    return basis


def turned(vanilla: Tensor, ablated: Tensor) -> Tensor:
    """Sum of the principal angles between two subspaces, in degrees, float64 ``[...]``.

    Both are orthonormal bases ``[..., size, rank]``. Small angles come from their sines and large ones from
    their cosines (Knyazev and Argentati 2002), so neither loses digits. Equal bases are at exactly 0.
    """
    overlap = vanilla.mT @ ablated
    cosines = torch.linalg.svdvals(overlap)
    sines = torch.linalg.svdvals(ablated - vanilla @ overlap).flip(-1)
    angles = torch.rad2deg(torch.atan2(sines, cosines)).sum(-1)
    same = (vanilla == ablated).flatten(-2).all(-1)
    return torch.where(same, torch.zeros_like(angles), angles)
