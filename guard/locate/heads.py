"""Safety attention heads: what a model's harmful queries look like without each of its heads (Zhou et al.).

Scores are Ships (``guard.locate.ships``) of every head, all of them in one sweep
(``guard.locate.head_sweep``); the selection is the highest of them, or a group found greedily
(``guard.locate.sahara``). Reference: *On the Role of Attention Heads in LLM Safety*, ICLR 2025.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from guard.cache import Cache
from guard.checkpoint import Checkpoint
from guard.data import Dataset
from guard.locate import sahara, ships, templates
from guard.locate.ablation import Ablation, Head
from guard.locate.errors import LocateError
from guard.locate.head_sweep import HeadSweep
from guard.locate.results import Scores, unit_set, versions
from guard.locate.templates import Template
from guard.locate.unit_set import Float64Array, UnitSet, top
from guard.prompts import Tokens

PER_QUERY = 10
"""Heads that are listed for each query."""


@dataclass(frozen=True)
class HeadsOptions:
    """Options of the method. Raises LocateError when they make no sense."""

    level: Literal["dataset", "query"] = "dataset"
    """``dataset``: by how many degrees the queries' dominant directions turn; ``query``: divergence of the
    next-token distribution in nats, mean over queries."""
    ablation: Ablation = "undifferentiated"
    """``undifferentiated``: attend to everything alike; ``scaling``: scale the head's output by epsilon."""
    epsilon: float = 1e-5
    """Factor of scaling. Undifferentiated attention is computed in its limit and has none."""
    search: Literal["greedy", "top"] = "greedy"
    """``greedy``: add heads one by one, each on top of the group so far; ``top``: the highest scores."""
    count: int = 3
    """Heads to select. A greedy search costs as many sweeps; beyond 3 the paper's models degenerate."""
    rank: int = 1
    """Number of dominant directions compared; for the level ``dataset``."""
    side: ships.Side = "left"
    """``left``: directions in query space (paper); ``right``: directions of the states; for ``dataset``."""
    template: Template = "chat"
    """``chat``: the model's own; ``query``: the paper's; ``tulu``: another one's; ``none``: the bare text."""
    limit: int = 200
    """Harmful prompts to use, the first ones that fit the model's context."""
    batch_tokens: int = 8192
    """Tokens that go through a block of the model at a time."""

    def __post_init__(self) -> None:
        for name in ("count", "rank", "limit", "batch_tokens"):
            if getattr(self, name) < 1:
                raise LocateError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.template not in get_args(Template):
            raise LocateError(f"template is {self.template!r}, expected one of {get_args(Template)}")
        if not 0.0 <= self.epsilon < 1.0:
            raise LocateError(f"epsilon is {self.epsilon}; expected 0 or more and less than 1")


def locate(
    model: Any,
    prompts: Sequence[Tokens],
    options: HeadsOptions | None = None,
    *,
    cache: Cache | None = None,
    identity: Any = None,
    progress: bool = False,
) -> Scores:
    """Score all heads of a loaded transformers model on harmful prompts, given as token ids.

    Weights may be of any dtype and on any devices. ``scores`` are ``attention`` ``[layers, heads]``, Ships of
    each head alone. ``extra`` holds ``divergence``, float64 ``[layers, heads, prompts]``; ``query_heads``,
    int64 ``[prompts, 10, 2]`` (fewer in a small model), layer and head, most divergent first; ``group``,
    int64 ``[count, 2]``, in the order of selection; ``group_scores``, float64 ``[count]``, of the group up to
    there or, for ``top``, of the head.
    With a ``cache``, each layer's result is kept under ``identity`` (of the weights), the prompts and the
    options, and an interrupted run goes on where it stopped. Raises LocateError.
    """
    options, began = options or HeadsOptions(), time.monotonic()
    if options.level == "dataset" and options.rank >= len(prompts):
        raise LocateError(
            f"{len(prompts)} prompts are too few for a subspace of rank {options.rank} that could turn; "
            "give more prompts"
        )
    if cache is not None and identity is None:
        raise LocateError("results can be kept only with an identity of the model's weights")
    sweep = HeadSweep(model, prompts, batch_tokens=options.batch_tokens)
    ruler = _Ruler(sweep, options)
    kept = _Kept(cache or Cache(None), [identity, [list(prompt) for prompt in prompts]], options)
    steps = options.count if options.search == "greedy" else 1
    bar = tqdm(total=sweep.shape.layers * steps, desc="heads by layer", disable=not progress)
    tables: list[Float64Array] = []

    def score(group: tuple[Head, ...]) -> Float64Array:
        tables.append(_sweep(sweep, ruler, kept, options, group, bar))
        return tables[-1][:, :, 0]

    with bar:
        found = sahara.search(score, steps)
    scores, chosen = tables[0][:, :, 0], [step.head for step in found]
    values = [step.score for step in found]
    if options.search == "top":
        selected = top({"attention": scores}, count=options.count)
        places = np.argwhere(selected["attention"]).tolist()
        chosen = sorted((Head(*place) for place in places), key=lambda head: -scores[head])
        values = [float(scores[head]) for head in chosen]
    mask = np.zeros(scores.shape, dtype=np.bool_)
    mask[tuple(np.array(chosen).T)] = True
    passes = sweep.block_tokens / sweep.shape.layers
    cost = {
        "forward_passes": passes / (sum(map(len, prompts)) / len(prompts)),
        "tokens": passes,
        "seconds": time.monotonic() - began,
    }
    extra = {
        "divergence": tables[0][:, :, 1:],
        "query_heads": query_heads(tables[0][:, :, 1:]),
        "group": np.array(chosen, dtype=np.int64),
        "group_scores": np.array(values),
    }
    return Scores({"attention": scores}, {"attention": mask}, cost, extra)


def query_heads(divergences: Float64Array, count: int = PER_QUERY) -> NDArray[np.int64]:
    """The ``count`` most divergent heads of each query, ``[prompts, count, 2]``: layer and head.

    ``divergences`` are ``[layers, heads, prompts]``.
    """
    flat = divergences.reshape(-1, divergences.shape[-1])
    order = np.argsort(-flat, axis=0, kind="stable")[:count].T
    return np.stack(np.unravel_index(order, divergences.shape[:2]), axis=-1).astype(np.int64)


def run(
    checkpoint: Checkpoint,
    datasets: Sequence[Dataset],
    options: HeadsOptions | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    cache: Cache | None = None,
    progress: bool = False,
    statistics: Path | None = None,
) -> UnitSet:
    """Score the heads of a checkpoint on the harmful prompts of some data sets.

    ``statistics`` names a safetensors file for ``Scores.extra``. Raises LocateError, CheckpointError.
    """
    options = options or HeadsOptions()
    tokenizer = checkpoint.load_tokenizer()
    harmful = [p for dataset in datasets for p in dataset.prompts if p.label == "harmful"]
    if not harmful:
        raise LocateError("the data hold no harmful prompt; this method compares what a model does with them")
    encoded = [templates.render(tokenizer, prompt, options.template) for prompt in harmful]
    fitting = [tokens for tokens in encoded if 0 < len(tokens) <= checkpoint.context][: options.limit]
    if not fitting:
        raise LocateError(
            f"none of the {len(harmful)} harmful prompts fits the model's context of {checkpoint.context} "
            "tokens; give shorter ones"
        )
    model = checkpoint.load_model(dtype, device)
    adapter = checkpoint.adapter.sha256 if checkpoint.adapter else None
    identity = [checkpoint.weights_sha256, adapter, dtype, device, versions()]
    found = locate(model, fitting, options, cache=cache, identity=identity, progress=progress)
    return unit_set("heads", found, options, checkpoint, datasets, tokenizer, statistics=statistics)


class _Ruler:
    """Measures states ``[heads, prompts, width]`` against the unablated ones."""

    def __init__(self, sweep: HeadSweep, options: HeadsOptions) -> None:
        self._sweep, self._options = sweep, options
        self._logits = sweep.logits(sweep.vanilla)
        # Small matrices in float64: no work for an accelerator.
        self._basis = ships.subspace(sweep.vanilla.cpu(), options.rank, options.side)

    def __call__(self, states: Tensor) -> Float64Array:
        """``[heads, 1 + prompts]``: the score of the level, then the divergence of each prompt."""
        apart = torch.stack(
            [ships.divergence(self._logits, self._sweep.logits(head)) for head in states]
        ).cpu()
        if self._options.level == "query":
            first = apart.mean(-1)
        else:
            turned = ships.subspace(states.cpu(), self._options.rank, self._options.side)
            first = ships.turned(self._basis, turned)
        joined: Float64Array = torch.cat([first[:, None], apart], dim=1).numpy()
        return joined


class _Kept:
    """Results by group and layer in a cache."""

    def __init__(self, cache: Cache, identity: Any, options: HeadsOptions) -> None:
        matters = {
            name: value
            for name, value in asdict(options).items()
            if name in ("level", "ablation", "epsilon", "rank", "side")
        }
        self._cache, self._key = cache, [identity, matters]

    def get(self, group: tuple[Head, ...], layer: int) -> Float64Array | None:
        """A layer's result, if there is one."""
        found: Any = self._cache.array("heads", [self._key, group, layer])
        return cast("Float64Array | None", found)

    def keep(self, group: tuple[Head, ...], layer: int, result: Float64Array) -> None:
        """Keep a layer's result."""
        # The cache stores any dtype; float32 is what its first user keeps.
        self._cache.keep_array("heads", [self._key, group, layer], cast(Any, result))


def _sweep(
    sweep: HeadSweep,
    ruler: _Ruler,
    kept: _Kept,
    options: HeadsOptions,
    group: tuple[Head, ...],
    bar: Any,
) -> Float64Array:
    """``[layers, heads, 1 + prompts]`` on top of a group, what is kept taken from there."""
    rows = {layer: kept.get(group, layer) for layer in range(sweep.shape.layers)}
    done = [layer for layer, row in rows.items() if row is not None]
    bar.update(len(done))
    if len(done) < len(rows):
        for layer, states in sweep.layers(options.ablation, epsilon=options.epsilon, group=group, skip=done):
            rows[layer] = ruler(states)
            kept.keep(group, layer, cast(Float64Array, rows[layer]))
            bar.update()
    return np.stack([cast(Float64Array, rows[layer]) for layer in sorted(rows)])
