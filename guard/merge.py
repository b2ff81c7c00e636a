"""Merge a LoRA adapter into a loaded model: the reference for what vLLM computes beside the weights.

vLLM keeps W and adds scale · B (A x) to each output; W + scale · B A is the same function, rounded in other
places.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from guard.adapters import WEIGHTS_FILE, Adapter, AdapterError

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_DECODER = re.compile(r"model\.layers\.\d+\..+")


def merge(model: nn.Module, adapter: Adapter) -> None:
    """Add the adapter to the weights of ``model``, in place. Raises AdapterError, and then changes nothing.

    Products are taken in float64 and the sum is rounded once, to the weights' own dtype.
    """
    pairs = _pairs(adapter)
    modules = dict(model.named_modules())
    for name, (a, b) in pairs.items():
        module = modules.get(name)
        # Embeddings and the head may share their weight, and vLLM treats them apart.
        if not isinstance(module, nn.Linear) or not _DECODER.fullmatch(name):
            raise AdapterError(f"{adapter.path} changes {name}, which is no linear layer of a decoder block")
        expected = ((adapter.rank, module.in_features), (module.out_features, adapter.rank))
        if (tuple(a.shape), tuple(b.shape)) != expected:
            raise AdapterError(
                f"{adapter.path}: A and B of {name} are {list(a.shape)} and {list(b.shape)}, "
                f"expected {list(expected[0])} and {list(expected[1])}"
            )
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            weight: Any = modules[name].weight
            weight.copy_(weight.double() + adapter.scale * (b.double() @ a.double()).to(weight.device))


def _pairs(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module, by the module's name."""
    try:
        tensors = load_file(adapter.path / WEIGHTS_FILE)
    except SafetensorError as error:
        raise AdapterError(f"{adapter.path / WEIGHTS_FILE} is not readable: {error}") from error
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        matched = _TENSOR.fullmatch(name)
        if matched is None:
            raise AdapterError(
                f"{adapter.path} holds the tensor {name}, expected base_model.model.….lora_A.weight or B"
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise AdapterError(f"{adapter.path}: {name} holds a value that is not a finite number")
        parts.setdefault(matched["module"], {})[matched["part"]] = tensor
    for module, there in parts.items():
        if there.keys() != {"A", "B"}:
            raise AdapterError(f"{adapter.path} holds lora_{min(there)} of {module} without the other half")
    missing = [t for t in adapter.targets if not any(m == t or m.endswith("." + t) for m in parts)]
    if missing or not parts:
        raise AdapterError(
            f"{adapter.path} holds no tensors for {', '.join(missing) or 'any module'}, "
            "which its target_modules name"
        )
    return {module: (there["A"], there["B"]) for module, there in parts.items()}
