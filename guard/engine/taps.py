"""Taps: read the bundle's units out of the running forward pass, and score them.

A tap is a forward pre-hook on a linear layer of the bundle's sites. It copies the staged rows' selected
columns into one buffer that was allocated at start-up; after the forward pass one matrix-vector product turns
the buffer into logits. A tap never changes its layer's input, so a passed request is untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from guard.bundle import Bundle
from guard.engine.errors import GuardStartupError
from guard.engine.staging import Staging
from guard.sites import module_name


class Taps:
    """All taps of one worker, their shared buffer, and the probe."""

    def __init__(self, bundle: Bundle, max_requests: int, device: torch.device) -> None:
        self.staging = Staging(max_requests)
        self._rows = torch.from_numpy(self.staging.rows)
        self._device = device
        shape = (max_requests, bundle.card.features)
        # NaN: a row that no tap has filled can never pass for a score.
        self._features = torch.full(shape, float("nan"), dtype=torch.float32, device=device)
        self._weight = torch.from_numpy(bundle.scorer.weight[0]).to(device)
        self._bias = torch.tensor(float(bundle.scorer.bias[0]), dtype=torch.float32, device=device)
        self._card = bundle.card

    def install(self, model: nn.Module) -> None:
        """Hook the bundle's sites into ``model``. Raises GuardStartupError when one is not as expected."""
        modules = dict(model.named_modules())
        begin = 0
        for site in self._card.sites:
            name = module_name(self._card.model.architecture, site.kind, site.layer)
            module: Any = modules.get(name)
            width = self._card.model.shape.width(site.kind)
            if module is None:
                raise GuardStartupError(f"the served model has no module {name}, which the bundle reads")
            if getattr(module, "input_size_per_partition", width) != width:
                raise GuardStartupError(
                    f"{name} takes {module.input_size_per_partition} columns here, "
                    f"but the bundle was fitted on {width}"
                )
            columns = self._card.columns(site)
            end = begin + len(columns)
            self._tap(module, columns, self._features[:, begin:end], every=len(columns) == width)
            begin = end

    def _tap(self, module: nn.Module, columns: list[int], out: Tensor, *, every: bool) -> None:
        staging, rows = self.staging, self._rows
        index = torch.tensor(columns, dtype=torch.int64, device=self._device)

        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            count = staging.count
            if count == 0:  # a step of decode only
                return
            # [tokens, width], or [1, tokens, width] where transformers' own layers run inside vLLM.
            tokens = args[0].flatten(0, -2)
            picked = tokens.index_select(0, rows[:count].to(index.device))
            out[:count].copy_(picked if every else picked.index_select(1, index))

        module.register_forward_pre_hook(read)

    def logits(self) -> dict[str, float]:
        """Raw logits of the requests whose final prompt token was in this step, by request id."""
        count = self.staging.count
        if count == 0:
            return {}
        scores = torch.addmv(self._bias, self._features[:count], self._weight)
        self._features[:count].fill_(float("nan"))
        return dict(zip(self.staging.request_ids, scores.tolist(), strict=True))
