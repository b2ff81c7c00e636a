"""How an engine can run its forward pass, as options and environment of vLLM."""

from __future__ import annotations

from typing import Any

MODES = ("eager", "compiled", "piecewise", "full", "full_and_piecewise", "full_decode_only")
"""``compiled`` is torch.compile without CUDA graphs; the later ones are both."""
_COMPILE_ALL = 3
"""CompilationMode.VLLM_COMPILE (vllm/config/compilation.py)."""


def options(mode: str, scheduling: str, dtype: str, device: str) -> dict[str, Any]:
    """Engine arguments: chunks and blocks so few that prompts are split and requests preempt each other."""
    chosen: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": 512,
        "max_num_batched_tokens": 96,
        "max_num_seqs": 8,
        "block_size": 32,
        "num_gpu_blocks_override": 40,
        "async_scheduling": scheduling == "async",
        "disable_log_stats": False,
        "enforce_eager": mode == "eager",
    }
    if device == "cuda":
        chosen["gpu_memory_utilization"] = 0.3
        if mode != "eager":
            chosen["compilation_config"] = {
                "mode": _COMPILE_ALL,
                "cudagraph_mode": "NONE" if mode == "compiled" else mode.upper(),
                "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 96],
            }
    return chosen


def environment(runner: str, cache: str) -> dict[str, str]:
    """Settings of an engine's process."""
    return {
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": cache,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        # float32 means float32: neither cuBLAS nor Triton's kernels may round to TF32.
        "VLLM_FLOAT32_MATMUL_PRECISION": "highest",
        "NVIDIA_TF32_OVERRIDE": "0",
        "TRITON_F32_DEFAULT": "ieee",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0",
    }
