"""How much a layer's output changes when one row or column of a weight is switched off, without trying it.

Zhao et al., *Understanding and Enhancing Safety Mechanisms of LLMs via Safety-Specific Neuron* (ICLR 2025).
Switching off means that the unit's coordinate becomes zero, its bias included. Everything here is about one
prompt without padding: ``T`` tokens, ``H`` query heads, ``G`` key and value heads, ``R = H / G``, head width
``D``, model width ``d``. Query head ``h`` reads key head ``h // R``; row ``(h // R) * D + c`` of the key and
value weights serves all ``R`` heads of its group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Side = Literal["query", "key"]
LARGEST = 1 << 24
"""Numbers in the largest intermediate of the attention forms; what needs more is cut into blocks."""


def mlp_importance(activations: Tensor, column_norms: Tensor) -> Tensor:
    """``sqrt(sum_t a[t, k]^2) * |W_down[:, k]|``: row k of up_proj, or column k of down_proj.

    ``activations`` is ``[T, F]``, the input of ``down_proj``; ``column_norms`` and the result are ``[F]``.
    """
    return activations.square().sum(0).sqrt() * column_norms


def value_gram(output_weight: Tensor, head_dim: int, groups: int) -> Tensor:
    """``K[g, c, r, s] = <W_O[:, (g, r), c], W_O[:, (g, s), c]>`` of ``o_proj.weight`` ``[d, H * D]``."""
    by_group = output_weight.view(len(output_weight), groups, -1, head_dim)
    return torch.einsum("ogrc,ogsc->gcrs", by_group, by_group)


def value_importance(mixed: Tensor, gram: Tensor) -> Tensor:
    """Change of the output of ``o_proj`` without a row of ``v_proj``: ``[G * D]``.

    ``mixed`` is ``[T, H * D]``, the input of ``o_proj``. Values stand outside the softmax, so the change is
    linear; the heads of a group add as vectors, which is what ``gram`` (:func:`value_gram`) is for.
    """
    groups, head_dim, per_group, _ = gram.shape
    z = mixed.view(len(mixed), groups, per_group, head_dim)
    pairs = torch.einsum("tgrc,tgsc->gcrs", z, z)
    # Rounding may leave a hair below zero where heads cancel.
    return (pairs * gram).sum((-1, -2)).clamp(min=0).sqrt().flatten()


class Attention(NamedTuple):
    """Attention of one layer over one prompt, as far as its map depends on it."""

    query: Tensor
    """``[T, H, D]``, normalised where the model does that, not yet rotated."""
    key: Tensor
    """``[T, G, D]``, likewise."""
    cos: Tensor
    """``[T, D]``, both halves alike."""
    sin: Tensor
    scaling: float
    """What scores are multiplied by."""
    softcap: float | None = None
    """Scores become ``softcap * tanh(score / softcap)``."""
    window: int | None = None
    """How many positions a token sees, itself included; None: all before it."""
    query_gain: Tensor | None = None
    """:func:`norm_gain` where queries are normalised by head, ``[T, H, D]``."""
    key_gain: Tensor | None = None
    """Likewise ``[T, G, D]``."""


def norm_gain(raw: Tensor, eps: float) -> Tensor:
    """By how much the rest of a head grows when coordinate c is missing from its root mean square.

    ``raw`` is ``[T, heads, D]`` before the norm; so is the result. Removing a row of the projection changes
    the norm's denominator too, and with it all other coordinates of that head and token.
    """
    square = raw.square()
    mean = square.mean(-1, keepdim=True) + eps
    return (mean / (mean - square / raw.shape[-1])).sqrt()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``[T, heads, D]`` in the two-halves layout."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def visible(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Which position (row) sees which (column): bool ``[T, T]``."""
    distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    seen = distance >= 0
    return seen & (distance < window) if window else seen


def scores(attention: Attention) -> Tensor:
    """Scaled scores before cap and mask, ``[G, R, T, T]``."""
    q, k = _rotated_pair(attention)
    return torch.einsum("igrc,jgc->grij", q, k) * attention.scaling


def weights(attention: Attention, raw_scores: Tensor) -> Tensor:
    """The attention map ``[G, R, T, T]`` of :func:`scores`."""
    return _softmax(raw_scores, attention, visible(raw_scores.shape[-1], attention.window, raw_scores.device))


def _softmax(raw_scores: Tensor, attention: Attention, seen: Tensor) -> Tensor:
    if attention.softcap:
        raw_scores = attention.softcap * torch.tanh(raw_scores / attention.softcap)
    return raw_scores.masked_fill(~seen, -torch.inf).softmax(-1)


def _rotated_pair(attention: Attention) -> tuple[Tensor, Tensor]:
    tokens, heads, head_dim = attention.query.shape
    q = rotated(attention.query, attention.cos, attention.sin)
    k = rotated(attention.key, attention.cos, attention.sin)
    groups = attention.key.shape[1]
    return q.view(tokens, groups, heads // groups, head_dim), k


class _Removal(NamedTuple):
    """What leaves the scores without coordinate c: ``sum_n left[n][i, c] * right[n][j, c]``."""

    left: tuple[Tensor, ...]
    """Each ``[T, G, R, D]``, on the side of the attending position."""
    right: tuple[Tensor, ...]
    """Each ``[T, G, 1, D]``, on the side of the position attended to."""
    query_gain: Tensor | None = None
    key_gain: Tensor | None = None


def _removal(attention: Attention, side: Side) -> _Removal:
    """Rotation spreads coordinate c of a projection over c and its partner, half a head away.

    Coordinate c alone contributes ``x cos[c]`` at c and ``+-x sin[partner]`` at the partner: plus in the
    first half of the head, minus in the second.
    """
    q, k = _rotated_pair(attention)
    k = k[:, :, None]
    half = attention.query.shape[-1] // 2
    unrotated = attention.query.view_as(q) if side == "query" else attention.key.view_as(k)
    other = k if side == "query" else q
    sign = torch.ones_like(attention.sin[0])
    sign[half:] = -1
    cos, sin = attention.cos, attention.sin.roll(half, -1) * sign
    own = tuple(unrotated * table[:, None, None] * attention.scaling for table in (cos, sin))
    met = (other, other.roll(half, -1))
    if side == "query":
        gain = attention.query_gain
        return _Removal(own, met, query_gain=None if gain is None else gain.view_as(q))
    gain = attention.key_gain
    return _Removal(met, own, key_gain=None if gain is None else gain.view_as(k))


class _Change(NamedTuple):
    groups: slice
    coordinates: slice
    rows: slice
    change: Tensor
    """Map without the unit minus the map, ``[groups, R, coordinates, rows, T]``."""


def _changes(attention: Attention, removal: _Removal, rows: range, largest: int) -> Iterator[_Change]:
    """The change of the map for every unit, in blocks of at most about ``largest`` numbers."""
    tokens, groups, per_group, head_dim = removal.left[0].shape[0], *_rotated_pair(attention)[0].shape[1:]
    before_cap = scores(attention)
    seen = visible(tokens, attention.window, before_cap.device)
    before = _softmax(before_cap, attention, seen)

    def units_first(x: Tensor) -> Tensor:
        return x.permute(1, 2, 3, 0)

    left = [units_first(x).expand(groups, per_group, -1, -1) for x in removal.left]
    right = [units_first(x) for x in removal.right]
    one = per_group * tokens
    row_step = max(1, min(len(rows), largest // one))
    column_step = max(1, min(head_dim, largest // (one * row_step)))
    group_step = max(1, min(groups, largest // (one * row_step * column_step)))
    for g in _slices(range(groups), group_step):
        for c in _slices(range(head_dim), column_step):
            for i in _slices(rows, row_step):
                changed = before_cap[g, :, None, i].expand(-1, -1, c.stop - c.start, -1, -1)
                for a, b in zip(left, right, strict=True):
                    changed = changed - a[g, :, c, i, None] * b[g, :, c, None, :]
                if removal.query_gain is not None:
                    changed = changed * units_first(removal.query_gain)[g, :, c, i, None]
                if removal.key_gain is not None:
                    changed = changed * units_first(removal.key_gain)[g, :, c, None, :]
                after = _softmax(changed, attention, seen[i])
                yield _Change(g, c, i, after - before[g, :, None, i])


def _slices(whole: range, step: int) -> Iterator[slice]:
    for start in range(whole.start, whole.stop, step):
        yield slice(start, min(start + step, whole.stop))


def map_importance(
    attention: Attention,
    side: Side,
    *,
    last_row: bool = False,
    largest: int = LARGEST,
) -> Tensor:
    """Frobenius norm of the change of the attention map: ``[H * D]`` for queries, ``[G * D]`` for keys.

    The maps of the heads of a group add in quadrature for keys. ``last_row`` looks at the last token only.
    """
    tokens, heads, head_dim = attention.query.shape
    groups = attention.key.shape[1]
    squares = attention.query.new_zeros(groups, heads // groups, head_dim)
    for block in _changes(attention, _removal(attention, side), _rows(tokens, last_row), largest):
        squares[block.groups, :, block.coordinates] += block.change.square().sum((-1, -2))
    return (squares if side == "query" else squares.sum(1)).sqrt().flatten()


def output_importance(
    attention: Attention,
    side: Side,
    values: Tensor,
    output_weight: Tensor,
    *,
    last_row: bool = False,
    largest: int = LARGEST,
) -> Tensor:
    """Norm of the change of the output of ``o_proj`` instead of the map; D times the work.

    ``values`` is ``[T, G, D]``, ``output_weight`` is ``o_proj.weight``. The heads of a group add as vectors.
    """
    tokens, heads, head_dim = attention.query.shape
    groups = attention.key.shape[1]
    by_group = output_weight.view(len(output_weight), groups, heads // groups, head_dim)
    squares = attention.query.new_zeros(groups, heads // groups if side == "query" else 1, head_dim)
    for block in _changes(attention, _removal(attention, side), _rows(tokens, last_row), largest // head_dim):
        moved = torch.einsum("grcij,jgd->grcid", block.change, values[:, block.groups])
        part = by_group[:, block.groups]
        if side == "query":
            gram = torch.einsum("ogrd,ogre->grde", part, part)
            added = torch.einsum("grcid,grde,grcie->grc", moved, gram, moved)
        else:
            gram = torch.einsum("ogrd,ogse->grdse", part, part)
            added = torch.einsum("grcid,grdse,gscie->gc", moved, gram, moved)[:, None]
        squares[block.groups, :, block.coordinates] += added
    return squares.clamp(min=0).sqrt().flatten()


def released_importance(attention: Attention, *, largest: int = LARGEST) -> Tensor:
    """What the authors' code computes for queries and keys alike: ``[H * D]``. Not a removal.

    The product of *rotated* coordinates is taken out of the scores without being scaled like them, and
    squared differences of the map are summed without a root.
    """
    q, k = _rotated_pair(attention)
    removal = _Removal((q,), (k[:, :, None],))
    squares = torch.zeros_like(q[0])
    for block in _changes(attention, removal, range(len(q)), largest):
        squares[block.groups, :, block.coordinates] += block.change.square().sum((-1, -2))
    return squares.flatten()


def _rows(tokens: int, last_row: bool) -> range:
    return range(tokens - 1, tokens) if last_row else range(tokens)
