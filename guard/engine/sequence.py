"""Taps for a sequence probe: a score for every token, kept in the KV cache's own address space.

Each tap weighs its layer's input by its part of the probe, for all tokens of the step. After the pass the
parts are summed and written to a table with one row for each KV slot. So a prefix-cache hit brings its scores
with it, recomputing after a preemption rewrites them, and a block that is freed and given to somebody else is
overwritten as its keys and values are. Tokens of answers are scored too: the next turn of a conversation
finds them in the cache and never computes them again.

A prompt's logit is pooled from its scores through its block table when its last chunk is done
(``guard.engine.pooling``); the same for the last tokens of a growing answer, in steps that are watched.

Rows that nobody has written hold NaN, and so does every part before its tap has run: what was not read never
passes for a score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guard.bundle import Bundle
from guard.engine import ops
from guard.engine.buffers import PendingScores, ScoreBuffers, StagedIntegers
from guard.engine.errors import GuardStartupError
from guard.engine.pooling import Pooler
from guard.engine.staging import KvPlaces, Layout, Staging
from guard.engine.taps import TAP, LocalSite, local_sites
from guard.sequence import SequenceScorer


class SequenceTap(nn.Module):
    """One site's part of the probe: buffers, which torch.compile treats as it does weights."""

    columns: Tensor
    weight: Tensor
    out: Tensor

    def __init__(self, columns: Tensor, weight: Tensor, out: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("out", out, persistent=False)
        self.width = width

    def forward(self, x: Tensor) -> None:
        """Weigh a layer's input ``[tokens, width]``."""
        torch.ops.neuronguard.weigh(x, self.columns, self.weight, self.out, self.width)


class SequenceTaps:
    """All taps of one worker, the table of scores, and the pooling.

    Stands in for ``guard.engine.taps.Taps`` and takes the same parameters; ``max_tokens`` is the most tokens
    of one forward pass. ``allocate`` gives it its table, once it is known how large the KV cache is.
    """

    def __init__(
        self,
        bundle: Bundle,
        probe: SequenceScorer,
        model: nn.Module,
        *,
        max_requests: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        replayed: bool,
        rank: int = 0,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.staging = Staging(max_requests)
        self._device, self._replayed, self._all_reduce = device, replayed, all_reduce
        sites = [site for site in local_sites(bundle.card, model, rank) if site.columns]
        channels = probe.pooling.channels
        self._parts = torch.full((len(sites), max_tokens, channels), torch.nan, device=device)
        self._sum = torch.zeros((max_tokens, channels), device=device)
        self._bias = torch.from_numpy(probe.bias).to(device)
        self._pooler = Pooler(probe.pooling, device)
        self._buffers = ScoreBuffers(max_requests, device)
        self._running_buffers = ScoreBuffers(max_requests, device)
        self._ended = StagedIntegers(2, max_requests, device)
        self._all = StagedIntegers(2, max_requests, device)
        self._table: Tensor | None = None
        self._taps = [self._install(site, part, probe) for site, part in zip(sites, self._parts, strict=True)]
        self.clear()

    @property
    def bytes(self) -> int:
        """Device memory of the guard on this rank, without the table (``table_bytes``)."""
        tensors = [self._parts, self._sum, self._bias]
        tensors += [tensor for tap in self._taps for tensor in (tap.columns, tap.weight)]
        own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        staged = (self._pooler, self._buffers, self._running_buffers, self._ended, self._all)
        return own + sum(part.bytes for part in staged)

    @property
    def table_bytes(self) -> int:
        """Device memory of the table: four bytes for each KV slot and channel."""
        return 0 if self._table is None else self._table.numel() * self._table.element_size()

    def allocate(self, slots: int) -> None:
        """Make the table for a KV cache of so many slots, in which nothing is known yet."""
        self._table = torch.full((slots, self._sum.shape[1]), torch.nan, device=self._device)

    def _install(self, site: LocalSite, out: Tensor, probe: SequenceScorer) -> SequenceTap:
        weight = torch.from_numpy(probe.weight[:, site.positions].copy("C"))
        columns = torch.tensor(site.columns)
        if 2 * len(site.columns) >= site.width:
            # Picking most of the columns out costs more than weighing the others by nothing.
            dense = torch.zeros((len(weight), site.width))
            dense[:, columns] = weight
            weight, columns = dense, columns[:0]
        tap = SequenceTap(columns.to(self._device), weight.to(self._device), out, site.width)
        setattr(site.module, TAP, tap)

        def read(module: Any, args: tuple[Tensor, ...]) -> None:
            if self._tokens:
                ops.weigh(args[0], tap.columns, tap.weight, tap.out, tap.width)

        def replayed(module: Any, args: tuple[Tensor, ...]) -> None:
            # The tap is found through its layer: torch.compile then sees its tensors as the model's.
            getattr(module, TAP)(args[0])

        site.module.register_forward_pre_hook(replayed if self._replayed else read)
        return tap

    def begin(self, *, idle: bool = False, watched: bool = False) -> None:
        """Start a step. ``watched``: answers that grow in it are to be pooled as well.

        ``idle`` is taken for the other taps' sake: every token is scored, whoever waits.
        """
        self.clear()
        self._watched = watched

    def clear(self) -> None:
        """Forget the last step: a forward pass that nobody staged is not read."""
        self.staging.clear()
        self._tokens = 0
        self._places: KvPlaces | None = None
        self._watched = False
        self._growing: list[Tensor] | None = None

    def stage(self, layout: Layout) -> None:
        """Take in where the tokens of the step lie, and which prompts end in it."""
        if layout.places is None or self._table is None:
            raise GuardStartupError("the guard was not told where the tokens of a step lie in the KV cache")
        count, n = self.staging.stage(layout), len(layout.request_ids)
        self._tokens, self._places = int(layout.start[n]), layout.places
        # A part that no tap fills can never pass for one.
        self._parts[:, : self._tokens].fill_(torch.nan)
        ended = self.staging.requests[:count]
        self._lengths = layout.prompt[ended].astype(np.int64)
        if self._watched:
            last = layout.computed[:n] + np.diff(layout.start[: n + 1]) - 1
            self._past = last >= layout.prompt[:n]
            self._names = list(layout.request_ids)
            self._growing = self._all.send(np.arange(n), last.astype(np.int64))

    def score(self) -> PendingScores | None:
        """Keep the scores of the tokens just computed; logits of the prompts that ended, if any."""
        if self._tokens == 0 or self._table is None or self._places is None:
            return None
        total = torch.sum(self._parts[:, : self._tokens], 0, out=self._sum[: self._tokens])
        if self._all_reduce is not None:
            total = self._all_reduce(total)
        self._table.index_copy_(0, self._places.slots[: self._tokens], total.add_(self._bias))
        count = self.staging.count
        if count == 0:
            return None
        requests, lengths = self._ended.send(self.staging.requests[:count], self._lengths)
        longest = int(self._lengths.max())
        logits = self._pooler.pool(self._table, self._places, requests, lengths, longest)
        return self._buffers.to_host(self.staging.request_ids, logits)

    def watch(self) -> PendingScores | None:
        """The pooled score of each answer's last tokens, by request; −inf where none has begun.

        To be called after ``score``. None in steps that are not watched.
        """
        if self._growing is None or self._table is None or self._places is None:
            return None
        values = self._pooler.running(self._table, self._places, *self._growing)
        return self._running_buffers.to_host(self._names, values, where=self._past)
