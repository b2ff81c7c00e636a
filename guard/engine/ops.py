"""The one operation of a tap: copy chosen elements of a layer's input into the guard's buffer.

It is registered with torch as ``neuronguard::gather``, so that torch.compile keeps it as one opaque node
and a CUDA graph replays it: it branches on shapes alone, never on data, and what it touches has fixed
addresses.
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


def _nothing(x: Tensor, index: Tensor, out: Tensor, begin: int, end: int, width: int) -> None:
    """Shapes only: what torch.compile traces with."""


LIBRARY.define("gather(Tensor x, Tensor index, Tensor(a!) out, int begin, int end, int width) -> ()")
LIBRARY.impl("gather", gather, "CPU")
LIBRARY.impl("gather", gather, "CUDA")
LIBRARY._register_fake("gather", _nothing)
