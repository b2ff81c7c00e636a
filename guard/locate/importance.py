"""Units that are consistently important for harmful prompts (Zhao et al., ICLR 2025).

A unit is *active* for a prompt when switching it off changes its own layer's output by more than a threshold,
here the share of most important units. Safety units are active for all prompts, or for a share of them; units
that general text needs as consistently are left out. One forward pass a prompt: see
``guard.locate.closed_forms``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from guard.cache import Cache
from guard.capture import batches
from guard.checkpoint import Checkpoint
from guard.data import Dataset
from guard.locate.errors import LocateError
from guard.locate.importance_options import ImportanceOptions, Matrix
from guard.locate.importance_reader import Reading, reading, widths
from guard.locate.passes import Cost, Kept, forward, usable
from guard.locate.results import Running, Scores, run_one_model
from guard.locate.unit_set import BoolArray, Component, Float64Array, UnitSet
from guard.observe import chunks
from guard.prompts import Tokens
from guard.sites import shape_of

__all__ = ["ImportanceOptions", "Tally", "locate", "run", "tally"]

logger = logging.getLogger(__name__)
_ROWS = 16
_MISMATCH = {torch.float64: 1e-3, torch.float32: 1e-3}
"""How far recomputed attention may be from the model's; rounding in half precision allows for more."""


class Tally(NamedTuple):
    """What the prompts of one kind have in common."""

    prompts: int
    active: dict[Matrix, Float64Array]
    """For how many prompts a unit was active, ``[layers, units]``; NaN: there is no such unit."""
    mean: dict[Matrix, Float64Array]
    """Mean importance over the prompts, ``[layers, units]``."""

    def consistent(self, share: float) -> dict[Matrix, BoolArray]:
        """Units active for at least ``share`` of the prompts, ``[layers, units]``."""
        # A share such as 0.7 of ten prompts is seven of them, whatever the rounding of the product.
        wanted = math.ceil(self.prompts * share - 1e-9)
        return {name: active >= wanted for name, active in self.active.items()}


def locate(
    model: Any,
    prompts: Sequence[Tokens],
    options: ImportanceOptions,
    *,
    foundation: Sequence[Tokens] = (),
    batch_tokens: int = 8192,
    progress: bool = False,
    kept: Kept | None = None,
) -> Scores:
    """Units active for ``prompts`` (harmful) and not for ``foundation`` (general text), from a loaded model.

    A score is the share of prompts that a unit is active for; units of equal share follow their mean
    importance. Units that general text needs are no candidates. ``extra`` holds, by matrix, ``importance``
    (mean), ``active`` and ``foundation`` (shares of the harmful and of the general prompts).
    Raises LocateError: no prompt, none that fits, NaN, attention that the closed forms do not describe.
    """
    if prompts and options.foundation and not foundation:
        raise LocateError(
            "there are no benign prompts to find the units that general text needs; add some, or set "
            "foundation to false"
        )
    cost, kept = Cost(), kept or Kept()
    settings: dict[str, Any] = {
        "batch_tokens": batch_tokens,
        "progress": progress,
        "cost": cost,
        "kept": kept,
    }
    found = tally(model, prompts, options, what="harmful", **settings)
    consistent = found.consistent(options.consistency)
    selected: dict[Component, BoolArray] = {name: consistent[name] for name in options.matrices}
    scores: dict[Component, Float64Array] = {
        name: (found.active[name] + _percentile(found.mean[name])) / found.prompts
        for name in options.matrices
    }
    extra: dict[str, Any] = {}
    if options.foundation:
        general = tally(model, foundation, options, what="benign", **settings)
        for name, common in general.consistent(options.consistency).items():
            selected[name] &= ~common
            scores[name][common] = np.nan
            extra[f"foundation.{name}"] = general.active[name] / general.prompts
    for name in options.matrices:
        extra[f"importance.{name}"] = found.mean[name]
        extra[f"active.{name}"] = found.active[name] / found.prompts
    if not any(mask.any() for mask in selected.values()):
        logger.warning("no unit is active for %g of the prompts; lower the consistency", options.consistency)
    return Scores(scores, selected, cost.as_dict(), extra)


def tally(
    model: Any,
    prompts: Sequence[Tokens],
    options: ImportanceOptions,
    *,
    what: str = "harmful",
    batch_tokens: int = 8192,
    progress: bool = False,
    cost: Cost | None = None,
    kept: Kept | None = None,
) -> Tally:
    """Count for how many prompts each unit is active. Memory does not grow with prompts or tokens.

    Prompts of one token are left out, since attention has nothing to choose there. Raises LocateError.
    """
    cost, kept = cost or Cost(), kept or Kept()
    units, layers = widths(model, options), shape_of(model.config).layers
    fitting = usable(prompts, context=int(model.config.max_position_embeddings), shortest=2, what=what)
    key = {
        name: value
        for name, value in asdict(options).items()
        if name not in ("consistency", "foundation", "template")
    }
    total = np.zeros((2, layers, sum(units.values())))
    with tqdm(total=len(fitting), desc=f"importance ({what})", disable=not progress) as bar:
        for chunk in chunks(fitting):

            def compute(chunk: Sequence[Tokens] = chunk) -> Float64Array:
                return _chunk(model, chunk, units, options, batch_tokens, cost)

            total += kept.of("importance", chunk, key, compute)
            bar.update(len(chunk))
    edges = np.cumsum(list(units.values()))[:-1]
    active, importance = (dict(zip(units, np.split(part, edges, axis=1), strict=True)) for part in total)
    return Tally(len(fitting), active, {name: x / len(fitting) for name, x in importance.items()})


def _chunk(
    model: Any,
    prompts: Sequence[Tokens],
    units: dict[Matrix, int],
    options: ImportanceOptions,
    batch_tokens: int,
    cost: Cost,
) -> Float64Array:
    """How often active, and the sum of importances: ``[2, layers, units of all matrices]``."""
    total = torch.zeros(2, shape_of(model.config).layers, sum(units.values()), dtype=torch.float64)
    for group in batches([len(prompt) for prompt in prompts], tokens=batch_tokens, rows=_ROWS):
        batch = [prompts[i] for i in group]
        with reading(model, [len(prompt) for prompt in batch], units, options) as read:
            forward(model, batch, cost)
        _check(model, read)
        sums = [x.sum(0) for x in read.importance.values()]
        counts = [_active(x, name, options).sum(0) for name, x in read.importance.items()]
        total += torch.stack([torch.cat(counts, -1), torch.cat(sums, -1)])
    return np.asarray(total.numpy(), dtype=np.float64)


def _active(importance: Tensor, matrix: Matrix, options: ImportanceOptions) -> Tensor:
    """Which units are active for each prompt: float64 ``[prompts, layers, units]``, NaN where there is none.

    The threshold is the importance of the last unit within the share; whatever ties with it is active too. A
    unit without any effect is never active.
    """
    missing = importance.isnan()
    pool = importance.nan_to_num(nan=-torch.inf)
    flat = pool.flatten(1) if options.scope == "model" else pool
    candidates = int((~missing[0]).sum() if options.scope == "model" else flat.shape[-1])
    wanted = max(1, round(options.active_share(matrix) * candidates))
    threshold = flat.topk(wanted, dim=-1).values[..., -1:]
    active = ((flat >= threshold) & (flat > 0)).view_as(importance)
    return torch.where(missing, torch.nan, active.double())


def _check(model: Any, read: Reading) -> None:
    """Raise LocateError unless all that the hooks have read is sound."""
    shape = shape_of(model.config)
    for name, values in read.importance.items():
        first = shape.first_mlp_layer if name == "mlp" else 0
        unread = [layer for layer in range(first, shape.layers) if (name, layer) not in read.seen]
        if unread:
            raise LocateError(
                f"nothing was seen of {name} at layers {unread}; is the model's forward replaced?"
            )
        bad = ~values[:, first:].isfinite().all(dim=-1).all(dim=0)
        if bad.any():
            layer = first + int(bad.nonzero()[0])
            raise LocateError(
                f"the importance of {name} at layer {layer} is not a finite number; the activations hold "
                "NaN or infinity: try another dtype, such as float32"
            )
    allowed = _MISMATCH.get(model.dtype, 0.1)
    # NaN where the attention output is zero throughout: there is nothing to compare.
    worst = read.mismatch.nan_to_num(nan=0.0).amax(0)
    if (worst > allowed).any():
        layer = int(worst.argmax())
        raise LocateError(
            f"the attention of layer {layer} is not the one the closed forms describe (relative difference "
            f"{float(worst[layer]):.2g}, expected at most {allowed:g}); load the model with eager "
            "attention if it caps scores, or leave query and key out of 'matrices'"
        )


def _percentile(mean: Float64Array) -> Float64Array:
    """Rank of the mean importance among all units of a matrix, from 0 to below 1; NaN stays."""
    known = ~np.isnan(mean)
    values, place = np.unique(mean[known], return_inverse=True)
    result = np.full_like(mean, np.nan)
    result[known] = place / len(values)
    return result


def run(
    checkpoint: Checkpoint,
    dataset: Dataset,
    options: ImportanceOptions,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    batch_tokens: int = 8192,
    seed: int = 0,
    progress: bool = False,
    cache: Cache | None = None,
    statistics: Path | None = None,
) -> UnitSet:
    """Locate with the harmful prompts of a data set; its benign prompts are the general text.

    Parts of the run are kept in ``cache``; ``statistics`` names a safetensors file for ``Scores.extra``.
    ``seed`` is recorded only: nothing is drawn. Raises LocateError, CheckpointError.
    """

    def find(model: Any, harmful: list[Tokens], benign: list[Tokens], **settings: Any) -> Scores:
        return locate(model, harmful, options, foundation=benign, **settings)

    how = Running(device, dtype, batch_tokens, seed, progress, cache, statistics)
    return run_one_model("importance", find, checkpoint, dataset, options, how)
