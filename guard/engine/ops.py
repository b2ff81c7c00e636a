"""The operations inside the forward pass: a tap reads a layer's input, a patch writes into it.

They are registered with torch as ``neuronguard::gather``, ``neuronguard::weigh`` and ``neuronguard::patch``,
so that torch.compile keeps each as one opaque node and a CUDA graph replays it: they branch on shapes alone,
never on data, and what they touch has fixed addresses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

LIBRARY = Library("neuronguard", "FRAGMENT")
"""Holds the operation; it lives as long as this object."""


def gather(x: Tensor, index: Tensor, out: Tensor, begin: int, end: int, width: int) -> None:
    """``out[r, c] = x.flatten()[index[r, c]]`` for columns ``begin`` to ``end``, in the rows ``x`` can fill.

    ``x`` is ``[tokens, width]`` (or with further leading dimensions), ``index`` and ``out`` are
    ``[requests, features]``. No step can end more prompts than it has tokens, so rows beyond that are left
    alone. Raises ValueError when the input is not as wide as the index was made for.
    """
    if x.shape[-1] != width:
        raise ValueError(f"a tapped layer was given {x.shape[-1]} columns, expected {width}")
    rows = min(out.shape[0], x.numel() // width)
    gather_rows(x, index, out, begin, end, rows)


def gather_rows(x: Tensor, index: Tensor, out: Tensor, begin: int, end: int, rows: int) -> None:
    """The same for the first ``rows`` rows only, unchecked."""
    target = out[:rows, begin:end]
    if x.dtype == out.dtype:
        torch.take(x, index[:rows, begin:end], out=target)
    else:
        target.copy_(torch.take(x, index[:rows, begin:end]))


def weigh(x: Tensor, columns: Tensor, weight: Tensor, out: Tensor, width: int) -> None:
    """``out[t] = weight @ x[t, columns]`` in float32 for every token; without columns, ``weight @ x[t]``.

    ``x`` is ``[tokens, width]`` (or with further leading dimensions), ``columns`` int64 ``[k]`` or empty,
    ``weight`` float32 ``[channels, k or width]`` (the other way round, several channels take four times as
    long on a CPU), ``out`` float32 ``[most tokens, channels]``. Raises ValueError when the input is not as
    wide as the weights were made for.
    """
    if x.shape[-1] != width:
        raise ValueError(f"a tapped layer was given {x.shape[-1]} columns, expected {width}")
    rows = x.reshape(-1, width)
    if len(columns):
        rows = rows.index_select(1, columns)
    torch.mm(rows.float(), weight.t(), out=out[: len(rows)])


def patch(x: Tensor, slot: Tensor, columns: Tensor, scale: Tensor, shift: Tensor) -> None:
    """``x[t, columns] = x[t, columns] · scale[slot[t]] + shift[slot[t]]`` unless ``slot[t]`` is 0, in place.

    ``x`` is ``[tokens, width]`` (or with further leading dimensions), ``slot`` int64 and at least as long,
    ``columns`` int64 ``[k]``, ``scale`` and ``shift`` ``[patches + 1, k]`` of the type of ``x``.
    """
    rows = x.view(-1, x.shape[-1])
    here = slot[: rows.shape[0]]
    old = rows.index_select(1, columns)
    new = torch.addcmul(shift.index_select(0, here), old, scale.index_select(0, here))
    rows.index_copy_(1, columns, torch.where((here > 0).unsqueeze(1), new, old))


def patch_rows(
    x: Tensor, rows: Tensor, slot: Tensor | int, columns: Tensor, scale: Tensor, shift: Tensor
) -> None:
    """The same for some rows only: int64 ``[n, 1]`` with a slot each ``[n]``, or one slot for all."""
    flat = x.view(-1, x.shape[-1])
    flat[rows, columns] = torch.addcmul(shift[slot], flat[rows, columns], scale[slot])


def _no_change(x: Tensor, slot: Tensor, columns: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Shapes only: what torch.compile traces with."""


def _nothing(x: Tensor, index: Tensor, out: Tensor, begin: int, end: int, width: int) -> None:
    """Shapes only: what torch.compile traces with."""


def _weighs_nothing(x: Tensor, columns: Tensor, weight: Tensor, out: Tensor, width: int) -> None:
    """Shapes only: what torch.compile traces with."""


LIBRARY.define("weigh(Tensor x, Tensor columns, Tensor weight, Tensor(a!) out, int width) -> ()")
LIBRARY.impl("weigh", weigh, "CPU")
LIBRARY.impl("weigh", weigh, "CUDA")
LIBRARY._register_fake("weigh", _weighs_nothing)
LIBRARY.define("patch(Tensor(a!) x, Tensor slot, Tensor columns, Tensor scale, Tensor shift) -> ()")
LIBRARY.impl("patch", patch, "CPU")
LIBRARY.impl("patch", patch, "CUDA")
LIBRARY._register_fake("patch", _no_change)
LIBRARY.define("gather(Tensor x, Tensor index, Tensor(a!) out, int begin, int end, int width) -> ()")
LIBRARY.impl("gather", gather, "CPU")
LIBRARY.impl("gather", gather, "CUDA")
LIBRARY._register_fake("gather", _nothing)
