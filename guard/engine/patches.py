"""Stored patches in the running forward pass: x ← x · scale[slot] + shift[slot], by token.

Slot 0 is every request that is not patched; its rows are not touched. All patches of a bundle lie in one
table for each layer they change, and the scheduler says which requests of a step run under which
(``SLOTS_ATTRIBUTE``). A layer that is both read and patched is read first: the probe sees what the model
made of a prompt that was patched below, not the values that are written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from guard.bundle import Bundle
from guard.engine import ops
from guard.engine.buffers import TokenSlots
from guard.engine.errors import GuardStartupError
from guard.engine.staging import Layout
from guard.patch import patched_module
from guard.patch_card import PatchSiteKind

PATCH = "neuronguard_patch_{kind}"
"""Name under which a patched layer holds its table."""

ADDED_AS_IT_IS = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""Architectures whose MLP output goes into the residual stream without a norm of its own."""


class Rows(NamedTuple):
    """The patched rows of a step."""

    rows: Tensor
    """int64 ``[n, 1]``."""
    slot: Tensor | int
    """int64 ``[n]``, or one for all."""


class Table(nn.Module):
    """What all patches do at one place: buffers, which torch.compile treats as it does weights."""

    slot: Tensor
    columns: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, slot: Tensor, columns: Tensor, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("slot", slot, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor) -> None:
        """Change ``x`` ``[tokens, width]`` in place."""
        torch.ops.neuronguard.patch(x, self.slot, self.columns, self.scale, self.shift)


class Patches:
    """All stored patches of one worker. Raises GuardStartupError when one cannot be served here.

    ``max_tokens`` is the most tokens of a step. ``replayed`` as for ``guard.engine.taps.Taps``.
    """

    def __init__(
        self,
        bundle: Bundle,
        model: nn.Module,
        *,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        replayed: bool,
        rank: int = 0,
    ) -> None:
        self._device = device
        self._replayed = replayed
        self._slots: Mapping[str, int] = {}
        self._tables: list[Table] = []
        self.rows: Rows | None = None
        self._dirty = 0
        cards = bundle.card.patches
        stored = [
            (slot, bundle.patches[card.name]) for slot, card in enumerate(cards, 1) if card.kind == "stored"
        ]
        self.dynamic = False
        """Whether a request of the step takes activations from a donor (``guard.engine.donor``)."""
        self._from_donor = {slot for slot, card in enumerate(cards, 1) if card.kind == "dynamic"}
        self._used = bool(stored or self._from_donor)
        if not self._used:
            return
        self._tokens = TokenSlots(max_tokens, device)
        shape = bundle.card.model.shape
        places: dict[tuple[int, PatchSiteKind], list[tuple[int, list[int], Tensor, Tensor]]] = {}
        for slot, patch in stored:
            for site, columns, part in patch.parts(shape):
                scale, shift = (torch.from_numpy(patch.arrays[name][part]) for name in ("scale", "shift"))
                places.setdefault((site.layer, site.kind), []).append((slot, columns, scale, shift))
        modules = dict(model.named_modules())
        for (layer, kind), parts in sorted(places.items()):
            name = patched_module(shape.architecture, kind, layer)
            if kind == "residual" and shape.architecture not in ADDED_AS_IT_IS:
                raise GuardStartupError(
                    f"a patch steers the residual stream of a {shape.architecture}, where the guard cannot: "
                    f"supported are {', '.join(ADDED_AS_IT_IS)}"
                )
            if name not in modules:
                raise GuardStartupError(f"the served model has no module {name}, which a patch changes")
            held = held_columns(modules[name], kind, rank)
            if kind == "residual" and any(columns[-1] not in held for _, columns, _, _ in parts):
                raise GuardStartupError(f"a patch steers more columns than {name} has: {len(held)}")
            table = _table(parts, held, len(cards) + 1, self._tokens.there, dtype, device)
            if table is not None:
                self._install(modules[name], kind, table)

    @property
    def bytes(self) -> int:
        """Device memory of the tables on this rank."""
        if not self._used:
            return 0
        tensors = [t for table in self._tables for t in (table.columns, table.scale, table.shift)]
        return sum(t.numel() * t.element_size() for t in tensors) + self._tokens.bytes

    def begin(self, slots: Mapping[str, int] | None) -> None:
        """Start a step in which these requests are patched."""
        self._slots = slots or {}
        self.rows, self.dynamic = None, False

    def stage(self, layout: Layout) -> None:
        """Find the rows of the patched requests in the step as it was laid out."""
        if not self._used or not (self._slots or self._dirty):
            return
        numbers = self._tokens.numbers
        end, before = int(layout.start[len(layout.request_ids)]), self._dirty
        numbers[: max(end, before)] = 0
        row_of = {rid: row for row, rid in enumerate(layout.request_ids)}
        for rid, slot in self._slots.items():
            row = row_of[rid]
            numbers[layout.start[row] : layout.start[row + 1]] = slot
        self._dirty = end if self._slots else 0
        if self._replayed:
            self._tokens.send(max(end, before))
        elif self._slots:
            self.rows = self._find(numbers[:end])
            self.dynamic = not self._from_donor.isdisjoint(self._slots.values())

    def clear(self) -> None:
        """Forget the step: a forward pass that nobody staged is not patched."""
        self.begin(None)

    def _find(self, numbers: NDArray[np.int64]) -> Rows:
        index = np.flatnonzero(numbers)
        slots = numbers[index]
        rows = torch.from_numpy(index).to(self._device).unsqueeze(1)
        if (slots == slots[0]).all():
            return Rows(rows, int(slots[0]))
        return Rows(rows, torch.from_numpy(slots).to(self._device))

    def _install(self, module: nn.Module, kind: PatchSiteKind, table: Table) -> None:
        self._tables.append(table)
        name = PATCH.format(kind=kind)
        setattr(module, name, table)
        patches, replayed = self, self._replayed

        def change(x: Tensor) -> None:
            if replayed:
                getattr(module, name)(x)
            elif patches.rows is not None:
                ops.patch_rows(x, *patches.rows, table.columns, table.scale, table.shift)

        if kind == "residual":
            module.register_forward_hook(
                lambda _module, _args, out: change(out[0] if isinstance(out, tuple) else out)
            )
        else:
            module.register_forward_pre_hook(lambda _module, args: change(args[0]))


def held_columns(module: Any, kind: PatchSiteKind, rank: int) -> range:
    """The columns of a place that this rank holds."""
    linear = getattr(module, "base_layer", module)  # LoRA wraps it
    if kind == "residual":  # the output is reduced over ranks, and each has all of it
        return range(getattr(linear, "output_size", getattr(linear, "out_features", 0)))
    whole = int(getattr(linear, "input_size", getattr(linear, "in_features", 0)))
    width = int(getattr(linear, "input_size_per_partition", whole))
    first = 0 if width == whole else getattr(linear, "tp_rank", rank) * width
    return range(first, first + width)


def _table(
    parts: list[tuple[int, list[int], Tensor, Tensor]],
    held: range,
    slots: int,
    slot: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> Table | None:
    """One table for what several patches do at one place, of the columns this rank holds."""
    union = sorted({c for _, columns, _, _ in parts for c in columns})
    here = [c for c in union if c in held]
    if not here:
        return None
    at = {column: place for place, column in enumerate(here)}
    scale, shift = torch.ones(slots, len(here)), torch.zeros(slots, len(here))
    for number, columns, scales, shifts in parts:
        for column, factor, value in zip(columns, scales, shifts, strict=True):
            if column in at:
                scale[number, at[column]], shift[number, at[column]] = factor, value
    local = torch.tensor([c - held.start for c in here], device=device)
    return Table(slot, local, scale.to(device, dtype), shift.to(device, dtype))
