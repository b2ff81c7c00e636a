"""Read the inputs of sites in a transformers model: the offline twin of the engine's taps.

A forward pre-hook on the linear layer of each site picks one position a row, or several, and the site's
columns out of its input, before ``down_proj`` or ``o_proj`` multiplies it.
Feature order is the bundle's: sites as given, columns of a site as in ``ModelShape.columns``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.bundle import Site
from guard.sites import module_name, shape_of

Float32Array = NDArray[np.float32]


class CaptureError(RuntimeError):
    """A site was not read exactly once in a forward pass."""


class Capture:
    """What the hooks of one forward pass have read."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._read: dict[int, Tensor] = {}

    def _keep(self, index: int, value: Tensor) -> None:
        if index in self._read:
            site = self._sites[index]
            raise CaptureError(f"the {site.kind} site at layer {site.layer} was read twice in one pass")
        self._read[index] = value

    def features(self) -> Tensor:
        """The activations ``[*positions, features]`` in the model's dtype. Raises CaptureError."""
        missing = [site.layer for index, site in enumerate(self._sites) if index not in self._read]
        if missing:
            raise CaptureError(f"no input was seen at layers {missing}; is the model's forward replaced?")
        return torch.cat([self._read[index] for index in range(len(self._sites))], dim=-1)


@contextmanager
def capture(model: Any, sites: Sequence[Site], positions: Tensor) -> Iterator[Capture]:
    """Read ``sites`` during one forward pass of ``model``, row ``b`` at ``positions[b]``.

    ``positions`` is an int64 ``[batch]`` of indices into the padded sequence, or ``[batch, picked]``. The
    hooks read and change nothing; they are removed when the block is left. Raises
    UnsupportedArchitectureError.
    """
    shape = shape_of(model.config)
    result, handles = Capture(sites), []
    rows = torch.arange(len(positions), device=positions.device)
    rows = rows if positions.ndim == 1 else rows[:, None]
    try:
        for index, site in enumerate(sites):
            module = model.get_submodule(module_name(shape.architecture, site.kind, site.layer))
            columns = torch.tensor(shape.columns(site.kind, site.units), device=positions.device)
            whole = len(columns) == shape.width(site.kind)

            def hook(
                _module: Any,
                inputs: tuple[Tensor, ...],
                index: int = index,
                columns: Tensor = columns,
                whole: bool = whole,
            ) -> None:
                # A mixture of experts flattens [batch, tokens, width] to [batch * tokens, width].
                picked = inputs[0].reshape(len(rows), -1, inputs[0].shape[-1])[rows, positions]
                result._keep(index, picked if whole else picked.index_select(-1, columns))

            handles.append(module.register_forward_pre_hook(hook))
        yield result
    finally:
        for handle in handles:
            handle.remove()


def pad(
    prompts: Sequence[Sequence[int]], *, side: str = "right", pad_token: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and attention mask ``[batch, longest]``, and last real positions ``[batch]``."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = 0 if side == "right" else longest - len(prompt)
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return ids, mask, last


@torch.inference_mode()
def read_batch(
    model: Any, sites: Sequence[Site], prompts: Sequence[Sequence[int]], *, side: str = "right"
) -> Tensor:
    """Activations ``[batch, features]`` at the last token of each prompt, in the model's dtype.

    Rotary positions are counted from the first real token, so the padded side does not matter.
    """
    if not all(prompts):
        raise ValueError("an empty prompt has no last token")
    ids, mask, last = (tensor.to(model.device) for tensor in pad(prompts, side=side))
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    # Rows of one length need no mask; without it attention takes its exact causal path.
    attention_mask = None if bool(mask.all()) else mask
    with capture(model, sites, last) as captured:
        # The decoder alone: logits over the vocabulary are not needed.
        model.base_model(
            input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
    return captured.features()


@torch.inference_mode()
def read_every_token(model: Any, sites: Sequence[Site], prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Activations ``[tokens, features]`` of each prompt, in the model's dtype, as if it had been alone.

    Rows are padded on the right, where nothing that is kept can see the padding.
    """
    if not all(prompts):
        raise ValueError("an empty prompt has no tokens")
    ids, mask, _ = (tensor.to(model.device) for tensor in pad(prompts))
    positions = torch.arange(ids.shape[1], device=model.device).expand(ids.shape)
    with capture(model, sites, positions) as captured:
        model.base_model(
            input_ids=ids,
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
    return [row[: len(prompt)] for row, prompt in zip(captured.features(), prompts, strict=True)]


def batches(lengths: Sequence[int], *, tokens: int = 8192, rows: int = 64) -> list[list[int]]:
    """Indices grouped by similar length: at most ``rows`` rows and about ``tokens`` padded tokens a batch."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        full = groups and (len(groups[-1]) >= rows or (len(groups[-1]) + 1) * lengths[index] > tokens)
        if not groups or full:
            groups.append([])
        groups[-1].append(index)
    return groups


def read_prompts(
    model: Any, sites: Sequence[Site], prompts: Sequence[Sequence[int]], *, tokens: int = 8192
) -> Float32Array:
    """Activations float32 ``[n, features]`` at the last token of each prompt, in the order given."""
    width = sum(len(shape_of(model.config).columns(site.kind, site.units)) for site in sites)
    out = np.empty((len(prompts), width), dtype=np.float32)
    for group in batches([len(prompt) for prompt in prompts], tokens=tokens):
        out[group] = read_batch(model, sites, [prompts[i] for i in group]).float().cpu().numpy()
    return out
