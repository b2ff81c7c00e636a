"""Read the residual stream and the token embeddings of prompts: what baselines are fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from guard.capture import Float32Array, batches, pad


@torch.inference_mode()
def read_residual(
    model: Any, layers: Sequence[int], prompts: Sequence[Sequence[int]], *, tokens: int = 8192
) -> Float32Array:
    """float32 ``[n, layers, hidden]``: the stream behind each layer at the last token of each prompt.

    Layers are counted from 1; 0 is the embedding. Behind the last one it is normalised, as transformers
    returns it.
    """
    out = np.empty((len(prompts), len(layers), int(model.config.hidden_size)), dtype=np.float32)
    for group in batches([len(prompt) for prompt in prompts], tokens=tokens):
        ids, mask, last = (t.to(model.device) for t in pad([prompts[i] for i in group]))
        states = model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        rows = torch.arange(len(group), device=last.device)
        picked = torch.stack([states[layer][rows, last] for layer in layers], dim=1)
        out[group] = picked.float().cpu().numpy()
    return out


@torch.inference_mode()
def mean_embeddings(model: Any, prompts: Sequence[Sequence[int]]) -> Float32Array:
    """float32 ``[n, hidden]``: the mean of each prompt's token embeddings, before any layer."""
    table = model.get_input_embeddings()
    rows = [table(torch.tensor(prompt, device=model.device)).float().mean(0) for prompt in prompts]
    return np.asarray(torch.stack(rows).cpu().numpy(), dtype=np.float32)
