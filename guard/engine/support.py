"""What this version of the guard has not been shown to work with, refused at start-up by name.

Each entry is a sentence and a test on vLLM's configuration. Nothing that is not listed as supported may run
silently unguarded, so a configuration is refused when in doubt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig

from guard.card import GuardCard
from guard.engine import quantisation
from guard.engine.errors import GuardStartupError
from guard.sites import MODULES

Check = Callable[[Any], bool]

TRANSFORMERS_BACKEND = ("Olmo2ForCausalLM",)
"""Architectures that vLLM runs with transformers' own layers, having no class for them."""

MIXTURES = (
    "Glm4MoeForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
)
"""Mixtures of experts among the supported architectures."""

ROTARY = ("default", "linear", "llama3", "longrope", "yarn")
"""Kinds of rotary scaling that were run."""

SPECULATION = ("ngram",)
"""Methods of speculative decoding that were run."""

OF_THE_MODEL: tuple[tuple[str, Check], ...] = (
    ("multi-modal models", lambda c: c.model_config.is_multimodal_model),
    ("encoder-decoder models", lambda c: c.model_config.is_encoder_decoder),
    (
        # vLLM's classes for them have no window for single layers; one in every layer was not tried.
        "sliding windows in Qwen2 and Qwen3 models (use_sliding_window)",
        lambda c: _architecture(c) in ("Qwen2ForCausalLM", "Qwen3ForCausalLM") and _has_window(c),
    ),
    (
        # vLLM's classes leave the last three out, transformers does not; a window in one was not tried.
        "a mixture of experts with a sliding window, or with clip_qkv or norm_topk_prob in OLMoE, or without "
        "qkv_bias in Qwen2-MoE",
        lambda c: _is_other_mixture(_architecture(c), c.model_config.hf_text_config),
    ),
    (
        "bidirectional attention (use_bidirectional_attention)",  # vLLM reads prompts causally all the same
        lambda c: bool(getattr(c.model_config.hf_text_config, "use_bidirectional_attention", False)),
    ),
    (
        f"rotary scaling of another kind than {', '.join(ROTARY)} (rope_type)",
        lambda c: not rotary_kinds(c.model_config.hf_text_config) <= set(ROTARY),
    ),
)
"""What follows from the checkpoint alone, however it is launched."""

REFUSED: tuple[tuple[str, Check], ...] = (
    (
        "pipeline parallelism (--pipeline-parallel-size)",
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
    ),
    (
        "data parallelism over several hosts or launches "
        "(--data-parallel-external-lb, --data-parallel-hybrid-lb, --data-parallel-size-local)",
        lambda c: (
            c.parallel_config.data_parallel_external_lb
            or c.parallel_config.data_parallel_hybrid_lb
            or c.parallel_config.data_parallel_size_local != c.parallel_config.data_parallel_size
        ),
    ),
    ("several hosts (--nnodes)", lambda c: c.parallel_config.nnodes > 1),
    (
        "an executor other than vLLM's own processes (--distributed-executor-backend)",
        lambda c: c.parallel_config.distributed_executor_backend not in (None, "mp", "uni"),
    ),
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
    ("expert parallelism (--enable-expert-parallel)", lambda c: c.parallel_config.enable_expert_parallel),
    (
        # A directive is accepted once; each API server would remember only those that it has seen itself.
        "several API-server processes (--api-server-count)",
        lambda c: int(getattr(c.parallel_config, "_api_process_count", 1)) > 1,
    ),
    ("micro-batching (--enable-dbo)", lambda c: bool(getattr(c.parallel_config, "use_ubatching", False))),
    (
        "speculative decoding by another method than ngram (--speculative-config)",
        lambda c: c.speculative_config is not None and c.speculative_config.method not in SPECULATION,
    ),
    (
        "sequence parallelism among tensor-parallel ranks (enable_sp in --compilation-config)",
        lambda c: bool(getattr(c.compilation_config.pass_config, "enable_sp", False)),
    ),
    (
        # It skips the rows of a prompt that nobody samples from, in the upper layers.
        "fast prefill by KV sharing (--kv-sharing-fast-prefill)",
        lambda c: bool(c.cache_config.kv_sharing_fast_prefill),
    ),
    ("prompt embeddings (--enable-prompt-embeds)", lambda c: c.model_config.enable_prompt_embeds),
    ("pooling models (--runner pooling)", lambda c: c.model_config.runner_type != "generate"),
    (
        "KV transfer and disaggregated prefill (--kv-transfer-config)",
        lambda c: c.kv_transfer_config is not None,
    ),
    (
        "weights that change while serving (--weight-transfer-config, --enable-sleep-mode)",
        lambda c: getattr(c, "weight_transfer_config", None) is not None or c.model_config.enable_sleep_mode,
    ),
    (
        "adapters that are loaded while serving (VLLM_ALLOW_RUNTIME_LORA_UPDATING)",
        lambda c: is_set("VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    ),
    (
        "vLLM's other implementation of this model; leave out --model-impl",
        lambda c: c.model_config.using_transformers_backend() != (_architecture(c) in TRANSFORMERS_BACKEND),
    ),
    (
        "LoRA adapters with a mixture of experts (--enable-lora)",
        lambda c: c.lora_config is not None and c.model_config.is_moe,
    ),
    (
        "data parallelism of a mixture of experts (--data-parallel-size)",
        lambda c: c.parallel_config.data_parallel_size > 1 and c.model_config.is_moe,
    ),
    (
        "rotary scaling of the longrope kind beyond the original context; "
        "lower --max-model-len to original_max_position_embeddings",
        lambda c: 0 < _original_context(c) < c.model_config.max_model_len,
    ),
    (
        "a model computed otherwise than its checkpoint says (--hf-overrides, --disable-sliding-window)",
        lambda c: (
            bool(c.model_config.hf_overrides)
            or (c.model_config.disable_sliding_window and _window_in_checkpoint(c.model_config.model))
        ),
    ),
    (
        "a KV cache in another dtype than the model's (--kv-cache-dtype)",
        lambda c: (
            c.cache_config.cache_dtype not in ("auto", str(c.model_config.dtype).removeprefix("torch."))
        ),
    ),
    (
        # The output of a request that has left would be taken for that of the next one of the same name.
        "request ids as clients choose them (VLLM_DISABLE_REQUEST_ID_RANDOMIZATION)",
        lambda c: is_set("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"),
    ),
    (
        "vLLM's development mode, whose routes replace weights (VLLM_SERVER_DEV_MODE)",
        lambda c: is_set("VLLM_SERVER_DEV_MODE"),
    ),
    *OF_THE_MODEL,
)


def rotary_kinds(config: Any) -> set[str]:
    """Kinds of rotary scaling in a transformers configuration: one, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in parameters.values() if isinstance(part, dict)]
    return {str(part.get("rope_type", "default")) for part in (nested or [parameters])}


def refuse_unsupported(vllm_config: Any) -> None:
    """Raise GuardStartupError with everything in ``vllm_config`` that the guard does not support."""
    found = [name for name, refused in REFUSED if refused(vllm_config)]
    found += quantisation.unsupported(vllm_config)
    _refuse(found, list(vllm_config.model_config.architectures))


def refuse_unservable(checkpoint: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that no launch of the engine would serve guarded; needs no vLLM.

    ``checkpoint`` is its directory. For fitting: a probe on what cannot be served is of no use. Raises
    GuardStartupError with everything that is not supported.
    """
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    architectures = list(getattr(config, "architectures", None) or ["<none>"])
    model = SimpleNamespace(
        architectures=architectures,
        hf_text_config=config.get_text_config(),
        is_multimodal_model=config.get_text_config() is not config,
        is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
    )
    found = [name for name, refused in OF_THE_MODEL if refused(SimpleNamespace(model_config=model))]
    _refuse(found, architectures)


def _refuse(found: list[str], architectures: list[str]) -> None:
    if not set(architectures) <= MODULES.keys():
        found = [
            *found,
            f"the architecture {', '.join(architectures)} (supported: {', '.join(sorted(MODULES))})",
        ]
    if found:
        raise GuardStartupError("this version of the guard does not support: " + "; ".join(found))


def refuse_too_few_slots(vllm_config: Any, adapters: int) -> None:
    """On a CPU, vLLM needs one LoRA slot more than there are adapters. Raises GuardStartupError.

    Its CPU kernels (vllm/lora/ops/torch_ops/lora_ops.py) look rows without an adapter up at slot -1, which is
    the last one: as long as it stays empty these rows come out right, also beside rows with an adapter.
    """
    from vllm.platforms import current_platform

    lora = vllm_config.lora_config
    if lora is not None and current_platform.is_cpu() and lora.max_loras <= adapters:
        raise GuardStartupError(
            f"on a CPU, {adapters} LoRA adapters need --max-loras {adapters + 1}, it is {lora.max_loras}: "
            "vLLM gives requests without an adapter the weights in the last slot, which has to stay empty"
        )


def can_watch(card: GuardCard, vllm_config: Any) -> bool:
    """Whether answers can be watched as they grow.

    Not with speculative decoding: of the tokens of a step, it is known only afterwards which were accepted.
    """
    return card.probe == "sequence" and vllm_config.speculative_config is None


def kv_slots(kv_cache_config: Any, runner: Any) -> int:
    """Slots of the KV cache, for a probe that keeps a score in each. Raises GuardStartupError.

    Every token of a request must have one slot that it keeps: one group of layers, all with full attention.
    """
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if kinds != ["FullAttentionSpec"]:
        raise GuardStartupError(
            "a sequence probe keeps a score for every token in the KV cache's address space, which needs one "
            f"kind of cache, with full attention, in all layers; there is: {', '.join(kinds) or 'none'}. "
            "Fit a probe of the last token for it (neuronguard fit --pooling last)"
        )
    if not hasattr(runner, "_prepare_inputs"):
        raise GuardStartupError(
            "a sequence probe has not been run with vLLM's second model runner; "
            "set VLLM_USE_V2_MODEL_RUNNER=0, or use a probe of the last token"
        )
    return int(kv_cache_config.num_blocks * groups[0].kv_cache_spec.block_size)


def _architecture(vllm_config: Any) -> str:
    return str(vllm_config.model_config.architectures[0])


def _has_window(vllm_config: Any) -> bool:
    kinds = getattr(vllm_config.model_config.hf_text_config, "layer_types", None) or ()
    return "sliding_attention" in kinds


def _is_other_mixture(architecture: str, config: Any) -> bool:
    if architecture not in MIXTURES:
        return False
    if getattr(config, "sliding_window", None) is not None:
        return True
    if architecture == "OlmoeForCausalLM":
        return config.clip_qkv is not None or bool(config.norm_topk_prob)
    return architecture == "Qwen2MoeForCausalLM" and not config.qkv_bias


def _window_in_checkpoint(directory: str) -> bool:
    """Whether the checkpoint itself has a window: vLLM sets its switch for those that say 0 as well."""
    path = Path(directory) / "config.json"
    document = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return bool(document.get("sliding_window")) and document.get("use_sliding_window") is not False


def _original_context(vllm_config: Any) -> int:
    """Tokens up to which a longrope model keeps its first angles; 0 for other models.

    With room for more, vLLM turns short prompts by the angles for long ones; transformers does not.
    """
    config = vllm_config.model_config.hf_text_config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return 0
    return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)


def is_set(variable: str) -> bool:
    """Whether an environment variable is there and not a way of saying no."""
    return os.environ.get(variable, "0").lower() not in ("", "0", "false")
