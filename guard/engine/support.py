"""What this version of the guard has not been shown to work with, refused at start-up by name.

Each entry is a sentence and a test on vLLM's configuration. Nothing that is not listed as supported may run
silently unguarded, so a configuration is refused when in doubt.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from guard.engine.errors import GuardStartupError
from guard.sites import MODULES

Check = Callable[[Any], bool]

TRANSFORMERS_BACKEND = ("Olmo2ForCausalLM",)
"""Architectures that vLLM runs with transformers' own layers, having no class for them."""

REFUSED: tuple[tuple[str, Check], ...] = (
    (
        "pipeline parallelism (--pipeline-parallel-size)",
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
    ),
    ("tensor parallelism (--tensor-parallel-size)", lambda c: c.parallel_config.tensor_parallel_size > 1),
    ("data parallelism (--data-parallel-size)", lambda c: c.parallel_config.data_parallel_size > 1),
    (
        "context parallelism (--decode-context-parallel-size, --prefill-context-parallel-size)",
        lambda c: (
            max(
                c.parallel_config.decode_context_parallel_size,
                getattr(c.parallel_config, "prefill_context_parallel_size", 1),
            )
            > 1
        ),
    ),
    ("several API-server processes (--api-server-count)", lambda c: _api_servers(c) > 1),
    ("micro-batching (--enable-dbo)", lambda c: bool(getattr(c.parallel_config, "use_ubatching", False))),
    ("speculative decoding (--speculative-config)", lambda c: c.speculative_config is not None),
    ("LoRA adapters (--enable-lora)", lambda c: c.lora_config is not None),
    ("quantised checkpoints (--quantization)", lambda c: c.model_config.quantization is not None),
    ("prompt embeddings (--enable-prompt-embeds)", lambda c: c.model_config.enable_prompt_embeds),
    ("pooling models (--runner pooling)", lambda c: c.model_config.runner_type != "generate"),
    ("multi-modal models", lambda c: c.model_config.is_multimodal_model),
    ("encoder-decoder models", lambda c: c.model_config.is_encoder_decoder),
    (
        "KV transfer and disaggregated prefill (--kv-transfer-config)",
        lambda c: c.kv_transfer_config is not None,
    ),
    (
        "torch.compile and CUDA graphs; add --enforce-eager",
        lambda c: not c.model_config.enforce_eager,
    ),
    (
        "asynchronous scheduling; add --no-async-scheduling",
        lambda c: bool(c.scheduler_config.async_scheduling),
    ),
    (
        "model runner V2; set VLLM_USE_V2_MODEL_RUNNER=0",
        lambda c: bool(getattr(c, "use_v2_model_runner", False)),
    ),
    (
        "vLLM's other implementation of this model; leave out --model-impl",
        lambda c: c.model_config.using_transformers_backend() != (_architecture(c) in TRANSFORMERS_BACKEND),
    ),
    (
        # vLLM's classes for them have no window for single layers; one in every layer was not tried.
        "sliding windows in Qwen2 and Qwen3 models (use_sliding_window)",
        lambda c: _architecture(c) in ("Qwen2ForCausalLM", "Qwen3ForCausalLM") and _has_window(c),
    ),
    (
        "bidirectional attention (use_bidirectional_attention)",  # vLLM reads prompts causally all the same
        lambda c: bool(getattr(c.model_config.hf_text_config, "use_bidirectional_attention", False)),
    ),
    (
        "rotary scaling of the longrope kind beyond the original context; "
        "lower --max-model-len to original_max_position_embeddings",
        lambda c: 0 < _original_context(c) < c.model_config.max_model_len,
    ),
    (
        "vLLM's development mode, whose routes replace weights (VLLM_SERVER_DEV_MODE)",
        lambda c: os.environ.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0"),
    ),
)


def refuse_unsupported(vllm_config: Any) -> None:
    """Raise GuardStartupError with everything in ``vllm_config`` that the guard does not support."""
    found = [name for name, refused in REFUSED if refused(vllm_config)]
    architectures = list(vllm_config.model_config.architectures)
    if not set(architectures) <= MODULES.keys():
        found.append(f"the architecture {', '.join(architectures)} (supported: {', '.join(sorted(MODULES))})")
    if found:
        raise GuardStartupError("this version of the guard does not support: " + "; ".join(found))


def _architecture(vllm_config: Any) -> str:
    return str(vllm_config.model_config.architectures[0])


def _has_window(vllm_config: Any) -> bool:
    kinds = getattr(vllm_config.model_config.hf_text_config, "layer_types", None) or ()
    return "sliding_attention" in kinds


def _original_context(vllm_config: Any) -> int:
    """Tokens up to which a longrope model keeps its first angles; 0 for other models.

    With room for more, vLLM turns short prompts by the angles for long ones; transformers does not.
    """
    config = vllm_config.model_config.hf_text_config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return 0
    return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)


def _api_servers(vllm_config: Any) -> int:
    return int(getattr(vllm_config.parallel_config, "_api_process_count", 1))
