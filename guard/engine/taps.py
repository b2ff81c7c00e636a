"""Taps: read the bundle's units out of the running forward pass, and score them.

A tap is a forward pre-hook on a linear layer of the bundle's sites. All taps share two tensors that are
allocated once: ``index``, which element of its layer's input each feature is, and ``features``, where they
are copied to. Both are ``[requests, features]``. Once a step, if a prompt ends in it, ``index`` is filled
for the rows in question (``stage``), the forward pass copies, and the probe turns ``features`` into logits
(``score``). A tap never changes its layer's input, so a passed request is untouched.

With tensor parallelism a rank holds some columns of each input, reads those, and adds its share of the
probe's first layer to the others' (vllm/model_executor/layers/linear.py, RowParallelLinear).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from guard.bundle import Bundle, GuardCard, Site
from guard.engine import ops
from guard.engine.buffers import PendingScores, ScoreBuffers
from guard.engine.errors import GuardStartupError
from guard.engine.head import ProbeHead
from guard.engine.staging import Layout, Staging
from guard.sites import module_name

TAP = "neuronguard_tap"
"""Name under which a tapped layer holds its tap."""


class LocalSite(NamedTuple):
    """What one rank reads at one site."""

    module: Any
    width: int
    """Columns of the layer's input on this rank."""
    columns: list[int]
    """Which of them are read."""
    positions: list[int]
    """Where the bundle has these features."""


class Tap(nn.Module):
    """One site's part of the shared tensors: buffers, which torch.compile treats as it does weights."""

    def __init__(self, index: Tensor, features: Tensor, begin: int, end: int, width: int) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("features", features, persistent=False)
        self.begin, self.end, self.width = begin, end, width

    def forward(self, x: Tensor) -> None:
        """Copy from a layer's input ``[tokens, width]``."""
        torch.ops.neuronguard.gather(x, self.index, self.features, self.begin, self.end, self.width)


class Taps:
    """All taps of one worker, their shared tensors, and the probe.

    ``max_requests`` is the most prompts that can end in one step. ``replayed`` says that the forward pass is
    traced or recorded once and replayed (torch.compile, CUDA graphs): the taps then copy in every step. Where
    Python runs in every step anyway, they do nothing unless a prompt ends.
    """

    def __init__(
        self,
        bundle: Bundle,
        model: nn.Module,
        *,
        max_requests: int,
        dtype: torch.dtype,
        device: torch.device,
        replayed: bool,
        rank: int = 0,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.staging = Staging(max_requests)
        self._replayed = replayed
        self._idle = False
        sites = local_sites(bundle.card, model, rank)
        self.positions = [position for site in sites for position in site.positions]
        """Which of the bundle's features this rank holds, in the order in which it does."""
        self._head = ProbeHead(
            bundle.scorer,
            self.positions,
            max_requests=max_requests,
            dtype=dtype,
            device=device,
            all_reduce=all_reduce,
        )
        self._columns = torch.tensor([c for site in sites for c in site.columns], device=device)
        self._widths = torch.tensor([site.width for site in sites for _ in site.columns], device=device)
        # Row 0 everywhere: right for any batch, so a forward pass that nobody staged stays in bounds.
        self._index = self._columns.repeat(max_requests, 1)
        self._features = torch.full(
            (max_requests, len(self.positions)), torch.nan, dtype=dtype, device=device
        )
        self._buffers = ScoreBuffers(max_requests, device)
        begin = 0
        for site in sites:
            end = begin + len(site.columns)
            if end > begin:
                self._install(site, begin, end)
            begin = end

    @property
    def bytes(self) -> int:
        """Device memory of the guard on this rank."""
        tensors = (self._index, self._features, self._columns, self._widths)
        return sum(t.numel() * t.element_size() for t in tensors) + self._head.bytes + self._buffers.bytes

    def _install(self, site: LocalSite, begin: int, end: int) -> None:
        tap = Tap(self._index, self._features, begin, end, site.width)
        setattr(site.module, TAP, tap)
        if self._replayed:
            site.module.register_forward_pre_hook(_replayed_hook)
            return
        staging, index, features, width = self.staging, self._index, self._features, site.width

        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if staging.count == 0:  # a step of decode only
                return
            x = args[0]
            if x.shape[-1] != width:
                raise ValueError(f"a tapped layer was given {x.shape[-1]} columns, expected {width}")
            ops.gather_rows(x, index, features, begin, end, staging.count)

        site.module.register_forward_pre_hook(read)

    def begin(self, *, idle: bool = False, watched: bool = False) -> None:
        """Start a step; ``idle`` says that nobody in it waits for a verdict. No answers are watched here."""
        self.clear()
        self._idle = idle

    def clear(self) -> None:
        """Forget the last step: a forward pass that nobody staged is not read."""
        self.staging.clear()

    def stage(self, layout: Layout) -> None:
        """Find the prompts that end in the step laid out, and point the taps at their final tokens."""
        if self._idle:
            return
        count = self.staging.stage(layout)
        if count == 0:
            return
        rows = self._buffers.to_device(self.staging.rows[:count])
        index = self._index[:count]
        torch.mul(rows.unsqueeze(1), self._widths, out=index)
        index.add_(self._columns)
        # A feature that no tap fills can never pass for one.
        self._features[:count].fill_(torch.nan)

    def score(self) -> PendingScores | None:
        """Logits of the prompts that ended in the forward pass just launched; None when there were none."""
        count = self.staging.count
        if count == 0:
            return None
        logits = self._head.logits(self._features[:count])
        if self._replayed:
            self._index[:count] = self._columns
        return self._buffers.to_host(self.staging.request_ids, logits)

    def watch(self) -> None:
        """Growing answers are not scored by a probe of the last prompt token."""

    def features(self, count: int) -> Tensor:
        """This rank's features ``[count, positions]`` of the step scored last; the next overwrites them."""
        return self._features[:count]


def _replayed_hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    # The tap is found through its layer: torch.compile then sees its tensors as the model's.
    getattr(module, TAP)(args[0])


def site_layers(card: GuardCard, model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose inputs are the bundle's sites, by name. Raises GuardStartupError."""
    modules = dict(model.named_modules())
    names = [module_name(card.model.architecture, site.kind, site.layer) for site in card.sites]
    missing = [name for name in names if name not in modules]
    if missing:
        raise GuardStartupError(f"the served model has no module {missing[0]}, which the bundle reads")
    return {name: modules[name] for name in names}


def local_sites(card: GuardCard, model: nn.Module, rank: int) -> list[LocalSite]:
    """The part of each site on this rank. Raises GuardStartupError when a layer is not as expected."""
    sites, begin = [], 0
    for site, (name, module) in zip(card.sites, site_layers(card, model).items(), strict=True):
        sites.append(_local_site(card, site, name, module, begin, rank))
        begin += len(card.columns(site))
    return sites


def _local_site(card: GuardCard, site: Site, name: str, module: Any, begin: int, rank: int) -> LocalSite:
    linear = getattr(module, "base_layer", module)  # LoRA wraps it
    whole = card.model.shape.width(site.kind)
    found = getattr(linear, "input_size", getattr(linear, "in_features", whole))
    width = getattr(linear, "input_size_per_partition", found)
    if found != whole:
        raise GuardStartupError(f"{name} takes {found} columns here, but the bundle was fitted on {whole}")
    if width != whole and not getattr(linear, "input_is_parallel", True):
        raise GuardStartupError(f"{name} splits its input itself; the guard reads inputs that come split")
    first = 0 if width == whole else getattr(linear, "tp_rank", rank) * width
    here = [(c - first, begin + i) for i, c in enumerate(card.columns(site)) if first <= c < first + width]
    return LocalSite(module, width, [column for column, _ in here], [position for _, position in here])
