"""Which quantised checkpoints the guard reads: only those whose layers compute with unrounded inputs.

A probe is fitted on what transformers computes and enforced on what vLLM computes. With integer weights and
inputs left alone, both multiply by the same expanded weights and agree to rounding. Where a layer rounds its
input as well, the two libraries choose other scales (for 8-bit integers the largest entry is 127.5 steps in
compressed-tensors and 127 in vLLM), so every score would move by the noise of the quantisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = "weights alone as 4-bit integers in groups (compressed-tensors, pack-quantized, W4A16)"

REASONS: dict[str, str] = {
    "awq": "transformers reads it only with the package gptqmodel",
    "gptq": "transformers reads it only with the package gptqmodel",
}
"""Why a method is refused, where that was looked into; every other one was not run."""


class UnsupportedQuantisationError(ValueError):
    """The checkpoint is quantised in a way that the guard has not been shown to read."""


def refuse_unshown(config: Any) -> None:
    """Raise UnsupportedQuantisationError unless a transformers configuration is of a kind that was shown."""
    document = quantisation_of(config)
    if not document:
        return
    found = unshown(document)
    if found:
        raise UnsupportedQuantisationError(
            f"the guard does not read checkpoints quantised as {found}; it reads {SHOWN}, and plain weights"
        )


def quantisation_of(config: Any) -> dict[str, Any]:
    """The ``quantization_config`` of a transformers configuration; empty when there is none."""
    document = getattr(config, "quantization_config", None) or {}
    return dict(document) if isinstance(document, Mapping) else document.to_dict()


def unshown(document: Mapping[str, Any]) -> str:
    """What about a ``quantization_config`` was not shown, as words that name it; empty when all of it was."""
    method = str(document.get("quant_method", "an unnamed method"))
    if method != "compressed-tensors":
        return f"{method} ({REASONS.get(method, 'not run')})"
    groups = list((document.get("config_groups") or {}).values())
    if any(group.get("input_activations") or group.get("output_activations") for group in groups):
        return f"{method} with rounded inputs (transformers and vLLM round them by other scales)"
    parts = {"kv_cache_scheme", "sparsity_config", "transform_config"} & {k for k, v in document.items() if v}
    if parts:
        return f"{method} with {', '.join(sorted(parts))} (not run)"
    if not groups or any(not _four_bits_in_groups(document, group) for group in groups):
        return f"{method} in another form of weights (not run)"
    return ""


def _four_bits_in_groups(document: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    weights = group.get("weights") or {}
    return (
        (group.get("format") or document.get("format")) == "pack-quantized"
        and weights.get("type") == "int"
        and weights.get("num_bits") == 4
        and weights.get("strategy") == "group"
        and bool(weights.get("symmetric"))
        and not weights.get("actorder")
        and not weights.get("dynamic")
    )
