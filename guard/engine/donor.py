"""Dynamic patches: an aligned donor runs on the same tokens in the same engine.

Before the served model's forward pass of a step with a dynamically patched request, the donor's stack runs
on the whole batch and the activations of the chosen units are kept; the served model then takes them in the
patched rows. The donor's attention layers have names of their own, hence KV tensors of their own under the
same block tables: one scheduler, one prefix cache, and twice the KV bytes a token. A step without such a
request skips the donor: its KV is only ever read by patched requests, and these own all of their blocks by
their salt and were computed from their first token while patched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guard.adapters import CONFIG_FILE
from guard.bundle import Bundle
from guard.digest import weights_digest
from guard.engine.errors import GuardStartupError
from guard.engine.patches import Patches, held_columns
from guard.patch import Patch
from guard.sites import SiteKind, module_name

PREFIX = "neuronguard_donor"
"""Begins the names of the donor's attention layers."""


class Donor:
    """The second stack of one worker, and what is taken over from it. Raises GuardStartupError.

    Made before any hook is on the served ``model``: a donor under an (IA)³ vector is a copy of its modules
    which shares every weight.
    """

    def __init__(self, bundle: Bundle, model: nn.Module, vllm_config: Any, checkpoint: str | None) -> None:
        self.patches = dynamic_patches(bundle)
        self._shape = bundle.card.model.shape
        first = next(iter(self.patches.values()))
        for patch in self.patches.values():
            if patch.card.donor != first.card.donor or not _same_vector(patch, first):
                raise GuardStartupError(
                    f"the patches {first.card.name!r} and {patch.card.name!r} have different donors; "
                    "one engine runs one donor"
                )
        if first.card.donor is None:
            self._stack = sharing_copy(model.get_submodule("model"), vllm_config)
            self._scale(first.arrays["vector"])
        else:
            self._stack = load_donor(vllm_config, checkpoint, first.card.donor.weights_sha256)

    def attach(self, patches: Patches, model: nn.Module, *, max_tokens: int, rank: int) -> None:
        """Hook the donor to the served ``model``, behind taps and stored patches."""
        self._rows = patches
        slots = max(self.patches) + 1
        places: dict[tuple[int, SiteKind], list[tuple[int, list[int], Tensor | None]]] = {}
        for slot, patch in self.patches.items():
            factor = patch.arrays.get("factor")
            for site, columns, part in patch.parts(self._shape):
                assert site.kind != "residual"  # noqa: S101 (the card refuses it)
                share = None if factor is None else torch.from_numpy(factor[part])
                places.setdefault((site.layer, site.kind), []).append((slot, columns, share))
        for (layer, kind), parts in sorted(places.items()):
            name = module_name(self._shape.architecture, kind, layer)
            self._connect(
                model.get_submodule(name),
                self._stack.get_submodule(name.removeprefix("model.")),
                parts,
                kind=kind,
                slots=slots,
                max_tokens=max_tokens,
                rank=rank,
            )
        model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._rows.dynamic:
            given = dict(zip(("input_ids", "positions"), args, strict=False)) | kwargs
            self._stack(given["input_ids"], given["positions"], None, None)

    def _scale(self, vector: np.ndarray[Any, Any]) -> None:
        """Put the (IA)³ vector ``[layers, mlp_width]`` on the inputs of the donor's MLP sites."""
        for layer in range(self._shape.first_mlp_layer, self._shape.layers):
            name = module_name(self._shape.architecture, "mlp", layer).removeprefix("model.")
            module = self._stack.get_submodule(name)
            held = held_columns(module, "mlp", 0)
            weight = next(module.parameters())
            factor = torch.from_numpy(vector[layer, held.start : held.stop].copy()).to(weight)

            def scale(_module: nn.Module, args: tuple[Tensor, ...], factor: Tensor = factor) -> Any:
                return (args[0] * factor, *args[1:])

            module.register_forward_pre_hook(scale)

    def _connect(
        self,
        ours: nn.Module,
        theirs: nn.Module,
        parts: Sequence[tuple[int, list[int], Tensor | None]],
        *,
        kind: SiteKind,
        slots: int,
        max_tokens: int,
        rank: int,
    ) -> None:
        held = held_columns(ours, kind, rank)
        here = sorted({c for _, columns, _ in parts for c in columns if c in held})
        if not here:
            return
        weight = next(ours.parameters())
        at = {column: place for place, column in enumerate(here)}
        taken_over = torch.zeros(slots, len(here), dtype=torch.bool)
        factor = torch.ones(len(here))
        for slot, columns, share in parts:
            for number, column in enumerate(columns):
                if column in at:
                    taken_over[slot, at[column]] = True
                    if share is not None:
                        factor[at[column]] = share[number]
        local = torch.tensor([c - held.start for c in here], device=weight.device)
        taken_over, factor = taken_over.to(weight.device), factor.to(weight)
        kept = torch.zeros(max_tokens, len(here), dtype=weight.dtype, device=weight.device)
        patches, scaled = self._rows, bool((factor != 1).any())

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].view(-1, args[0].shape[-1])
            target = torch.index_select(x, 1, local, out=kept[: x.shape[0]])
            if scaled:
                target.mul_(factor)

        def take(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not patches.dynamic or patches.rows is None:
                return
            rows, slot = patches.rows
            x = args[0].view(-1, args[0].shape[-1])
            x[rows, local] = torch.where(taken_over[slot], kept[rows.squeeze(1)], x[rows, local])

        theirs.register_forward_pre_hook(keep)
        ours.register_forward_pre_hook(take)


def refuse_donor(bundle: Bundle, vllm_config: Any, *, replayed: bool) -> None:
    """Raise GuardStartupError where a bundle has patches from a donor and this engine cannot run one.

    ``replayed`` as for ``guard.engine.taps.Taps``.
    """
    if not dynamic_patches(bundle):
        return
    if replayed:
        raise GuardStartupError(
            "patches from a donor run in eager mode only; start with --enforce-eager, or take the dynamic "
            "patches out of the bundle"
        )
    if vllm_config.lora_config is not None:
        # The copy of an adapter's layer would never be told which adapter a row is under.
        raise GuardStartupError(
            "patches from a donor do not work beside LoRA adapters; start without --enable-lora, or take the "
            "dynamic patches out of the bundle"
        )


def dynamic_patches(bundle: Bundle) -> dict[int, Patch]:
    """The bundle's dynamic patches by their numbers."""
    cards = enumerate(bundle.card.patches, start=1)
    return {slot: bundle.patches[card.name] for slot, card in cards if card.kind == "dynamic"}


def sharing_copy(stack: nn.Module, vllm_config: Any) -> Any:
    """A copy of a decoder stack that shares all tensors, and whose attention layers have their own KV."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    memo: dict[int, Any] = {id(vllm_config): vllm_config}
    memo |= {id(value): value for value in vars(vllm_config).values() if value is not None}
    for module in stack.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            memo[id(tensor)] = tensor
    context = vllm_config.compilation_config.static_forward_context
    names = {id(layer): name for name, layer in context.items()}
    twin: Any = copy.deepcopy(stack, memo)
    copied: Any
    for module, copied in zip(stack.modules(), twin.modules(), strict=True):
        if isinstance(module, AttentionLayerBase):
            name = f"{PREFIX}.{names[id(module)]}"
            copied.layer_name = name
            context[name] = copied
    return twin


def load_donor(vllm_config: Any, checkpoint: str | None, weights_sha256: str) -> Any:
    """The decoder stack of a donor with weights of its own. Raises GuardStartupError."""
    from vllm.config import ModelConfig
    from vllm.model_executor.model_loader import get_model

    if checkpoint is None:
        raise GuardStartupError(
            "the bundle has a patch from a donor; name its directory with --guard-donor DIR"
        )
    if (Path(checkpoint) / CONFIG_FILE).is_file():
        raise GuardStartupError(
            f"{checkpoint} is a LoRA adapter, and a donor is a whole checkpoint: merge the adapter into its "
            "base model first"
        )
    if not Path(checkpoint).is_dir() or (found := weights_digest(checkpoint)) != weights_sha256:
        seen = "there is no such directory" if not Path(checkpoint).is_dir() else f"its digest is {found}"
        raise GuardStartupError(
            f"{checkpoint} is not the donor that the bundle's patches are from: {seen}, expected "
            f"{weights_sha256}"
        )
    served = vllm_config.model_config
    config = ModelConfig(
        model=checkpoint,
        tokenizer=served.tokenizer,
        dtype=served.dtype,
        max_model_len=served.max_model_len,
        seed=served.seed,
        enforce_eager=served.enforce_eager,
    )
    return get_model(vllm_config=vllm_config, model_config=config, prefix=PREFIX).get_submodule("model")


def _same_vector(one: Patch, other: Patch) -> bool:
    vectors: Mapping[str, Any] = one.arrays
    if "vector" not in vectors or "vector" not in other.arrays:
        return "vector" not in vectors and "vector" not in other.arrays
    return bool(np.array_equal(vectors["vector"], other.arrays["vector"]))
