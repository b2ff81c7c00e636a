"""Units that safety, utility, both or neither depend on (Li & Kim, ICLR 2026, arXiv 2410.10862).

The importance of channel j of the input x of a linear layer W is ``Var(x_j) * |W[:, j]|^2``, FLAP's score:
the mean squared error of the output when the channel is replaced by its mean, times n / (n - 1), since the
variance is the unbiased one. It is taken over a safety and a utility set; the two decide a unit's class.

Only the inputs of ``down_proj`` and ``o_proj`` are read, one forward pass a prompt; sums are kept in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from guard.cache import Cache
from guard.capture import batches
from guard.checkpoint import Checkpoint
from guard.data import Dataset
from guard.locate.capacity_classes import classify, edges, normalised
from guard.locate.capacity_options import KINDS, CapacityOptions
from guard.locate.errors import LocateError
from guard.locate.moments import Moments
from guard.locate.passes import Cost, Kept, forward, usable
from guard.locate.results import Running, Scores, run_one_model
from guard.locate.unit_set import BoolArray, Component, Float64Array, UnitSet
from guard.observe import chunks
from guard.prompts import Tokens
from guard.sites import ModelShape, SiteKind, module_name, shape_of

__all__ = ["CapacityOptions", "importance", "locate", "run"]


def locate(
    model: Any,
    safety: Sequence[Tokens],
    utility: Sequence[Tokens],
    options: CapacityOptions,
    *,
    batch_tokens: int = 8192,
    progress: bool = False,
    kept: Kept | None = None,
) -> Scores:
    """Divide the units of a loaded model by what they vary for.

    A score is the quantity that the selected class is taken by: the safety minus the utility importance, its
    negative, their sum (complex) or its negative (redundant), normalised. ``extra`` holds, by component,
    ``safety`` and ``utility`` (importances as measured) and ``class`` (an index into ``KINDS``, -1: no such
    unit). Raises LocateError.
    """
    cost, kept = Cost(), kept or Kept()
    settings: dict[str, Any] = {
        "batch_tokens": batch_tokens,
        "progress": progress,
        "cost": cost,
        "kept": kept,
    }
    raw_safety = importance(model, safety, options, what="harmful", **settings)
    raw_utility = importance(model, utility, options, what="benign", **settings)
    safe, useful = normalised(raw_safety, options.normalise), normalised(raw_utility, options.normalise)
    classes = classify(safe, useful, edges(safe, useful, options))
    extra: dict[str, NDArray[Any]] = {}
    scores: dict[Component, Float64Array] = {}
    for name in safe:
        gap, total = safe[name] - useful[name], safe[name] + useful[name]
        scores[name] = {"scu": gap, "ucu": -gap, "cu": total, "ru": -total}[options.select]
        extra |= {
            f"safety.{name}": raw_safety[name],
            f"utility.{name}": raw_utility[name],
            f"class.{name}": classes[name],
        }
    selected: dict[Component, BoolArray] = {
        name: chosen == KINDS.index(options.select) for name, chosen in classes.items()
    }
    return Scores(scores, selected, cost.as_dict(), extra)


def importance(
    model: Any,
    prompts: Sequence[Tokens],
    options: CapacityOptions,
    *,
    what: str = "harmful",
    batch_tokens: int = 8192,
    progress: bool = False,
    cost: Cost | None = None,
    kept: Kept | None = None,
) -> dict[Component, Float64Array]:
    """Activation variance times squared column norm, ``[layers, units]``. Raises LocateError."""
    cost, kept = cost or Cost(), kept or Kept()
    shape = shape_of(model.config)
    fitting = usable(prompts, context=int(model.config.max_position_embeddings), shortest=1, what=what)
    sites = _sites(shape)
    total = {site: Moments() for site in sites}
    with tqdm(total=len(fitting), desc=f"variances ({what})", disable=not progress) as bar:
        for chunk in chunks(fitting):

            def compute(chunk: Sequence[Tokens] = chunk) -> Float64Array:
                return _chunk(model, chunk, sites, options, batch_tokens, cost)

            packed = torch.from_numpy(kept.of("capacity", chunk, {"positions": options.positions}, compute))
            rows = len(chunk) if options.positions == "last" else sum(map(len, chunk))
            begin = 0
            for kind, layer in sites:
                end = begin + shape.width(kind)
                total[kind, layer].merge(rows, packed[0, begin:end], packed[1, begin:end])
                begin = end
            bar.update(len(chunk))
    if next(iter(total.values())).count < 2:
        raise LocateError(f"one {what} token has no variance; give at least two prompts, or all positions")
    return _scored(model, shape, total, options)


def _sites(shape: ModelShape) -> list[tuple[SiteKind, int]]:
    attention: list[tuple[SiteKind, int]] = [("attention", layer) for layer in range(shape.layers)]
    return [
        ("mlp", layer) for layer in range(shape.first_mlp_layer, shape.layers) if shape.mlp_width
    ] + attention


def _chunk(
    model: Any,
    prompts: Sequence[Tokens],
    sites: Sequence[tuple[SiteKind, int]],
    options: CapacityOptions,
    batch_tokens: int,
    cost: Cost,
) -> Float64Array:
    """Means and sums of squared deviations, ``[2, channels of all sites]``."""
    architecture = shape_of(model.config).architecture
    moments = {site: Moments() for site in sites}
    lengths: list[int] = []

    def hook(site: tuple[SiteKind, int]) -> Any:
        def read(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            # A mixture of experts flattens [batch, tokens, width] to [batch * tokens, width].
            rows = inputs[0].reshape(len(lengths), -1, inputs[0].shape[-1])
            first = [length - 1 if options.positions == "last" else 0 for length in lengths]
            real = [row[a:b] for row, a, b in zip(rows, first, lengths, strict=True)]
            moments[site].add(torch.cat(real))

        return read

    with ExitStack() as hooks:
        for kind, layer in sites:
            module = model.get_submodule(module_name(architecture, kind, layer))
            hooks.callback(module.register_forward_pre_hook(hook((kind, layer))).remove)
        for group in batches([len(prompt) for prompt in prompts], tokens=batch_tokens):
            lengths[:] = [len(prompts[i]) for i in group]
            forward(model, [prompts[i] for i in group], cost)
    packed = []
    for (kind, layer), seen in moments.items():
        if seen.mean is None or seen.squares is None:
            raise LocateError(
                f"nothing was seen of the {kind} site at layer {layer}; is the forward replaced?"
            )
        both = torch.stack([seen.mean, seen.squares]).cpu()
        if not both.isfinite().all():
            raise LocateError(
                f"the activations of the {kind} site at layer {layer} hold NaN or infinity; try "
                "another dtype, such as float32"
            )
        packed.append(both)
    return np.asarray(torch.cat(packed, -1).numpy(), dtype=np.float64)


def _scored(
    model: Any, shape: ModelShape, moments: Mapping[tuple[SiteKind, int], Moments], options: CapacityOptions
) -> dict[Component, Float64Array]:
    result: dict[Component, Float64Array] = {}
    for (kind, layer), seen in moments.items():
        weight = model.get_submodule(module_name(shape.architecture, kind, layer)).weight
        # Squared and summed in float64 even for half-precision weights.
        norms = weight.detach().double().square().sum(0).cpu()
        score = (seen.variance().cpu() * norms).numpy()
        name: Component = kind
        if kind == "attention":
            if options.attention_unit == "head":
                score = score.reshape(shape.heads, shape.head_dim).mean(1)
            else:
                name = "channel"
        result.setdefault(name, np.full((shape.layers, len(score)), np.nan))[layer] = score
    return result


def run(
    checkpoint: Checkpoint,
    dataset: Dataset,
    options: CapacityOptions,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    batch_tokens: int = 8192,
    seed: int = 0,
    progress: bool = False,
    cache: Cache | None = None,
    statistics: Path | None = None,
) -> UnitSet:
    """Divide with the harmful prompts of a data set as the safety set, its benign ones as the utility set.

    Parts of the run are kept in ``cache``; ``statistics`` names a safetensors file for ``Scores.extra``.
    ``seed`` is that of ``CapacityOptions.bootstrap``. Raises LocateError, CheckpointError.
    """

    def find(model: Any, harmful: list[Tokens], benign: list[Tokens], **settings: Any) -> Scores:
        if options.bootstrap:
            random = np.random.default_rng(seed)
            harmful, benign = (
                [prompts[i] for i in random.integers(len(prompts), size=len(prompts))] if prompts else prompts
                for prompts in (harmful, benign)
            )
        return locate(model, harmful, benign, options, **settings)

    how = Running(device, dtype, batch_tokens, seed, progress, cache, statistics)
    return run_one_model("capacity", find, checkpoint, dataset, options, how)
