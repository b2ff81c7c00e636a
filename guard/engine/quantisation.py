"""Quantised checkpoints in the engine: which are served, and layers whose input is no longer a tensor.

vLLM may fuse an activation function with the quantisation of the next layer's input
(vllm/model_executor/layers/fusion/fused_act_quant.py): the layer is then handed a ``QuantizedActivation``,
and there are no activations to read. A layer that can take one says so by its input quantisation key.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from guard.engine.errors import GuardStartupError
from guard.quantisation import SHOWN, quantisation_of, unshown


def unsupported(vllm_config: Any) -> list[str]:
    """What about a quantised model has not been shown, as words that name it; empty when nothing."""
    model, method = vllm_config.model_config, vllm_config.model_config.quantization
    if method is None:
        return []
    document = quantisation_of(model.hf_config)
    if not document:
        return [f"quantisation while loading (--quantization {method})"]
    found = unshown(document)
    if method != document.get("quant_method"):
        found = found or f"{document.get('quant_method')} and loaded as {method}"
    if found:
        return [f"checkpoints quantised as {found} (--quantization; supported: {SHOWN})"]
    others = []
    if model.dtype == torch.float32:
        # vLLM's kernels for 4-bit weights have none (csrc/cpu: cpu_gemm_wna16).
        others.append("float32 on a quantised checkpoint; add --dtype float16 or --dtype bfloat16")
    if model.is_moe:
        others.append("quantised mixtures of experts")
    if vllm_config.lora_config is not None:
        others.append("LoRA adapters on a quantised checkpoint")
    return others


def refuse_fused(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse tapped layers that may be handed a quantised object instead of a tensor.

    ``names`` are dotted module names, ``model`` the loaded model, after vLLM has processed its weights.
    Raises GuardStartupError.
    """
    from vllm.model_executor.layers.fusion.quant_activation import get_input_quant_key

    for name in names:
        module: Any = model.get_submodule(name)
        key = get_input_quant_key(getattr(module, "base_layer", module))  # LoRA wraps it
        if key is not None:
            raise GuardStartupError(
                f"{name} takes its input already quantised ({key}), so the guard cannot read it; serve a "
                f"checkpoint that is not quantised, or {SHOWN}"
            )
