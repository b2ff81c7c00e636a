"""vLLM's schedulers with the guard in front, for a tiny model that is not run: configuration and requests."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from guard.bundle import Bundle
from guard.engine import compat
from guard.engine.config import AUDIENCE_ENV, EXTRA_ARG, KEY_FILE_ENV, GuardConfig
from guard.engine.scheduler import guard_scheduler
from guard.sealed import Keyring
from guard.verdict import Decision, Directive
from tests.engine.schedules import DECISIONS, Asked

BLOCK = 16
BLOCKS = 23
"""Of which one is never given out. The longest request fits, two of them do not."""
CHUNK = 64
END = 256
DRAFTS = 3


@dataclass(frozen=True)
class Mode:
    """One way to run vLLM."""

    queue: int = 1
    """Steps under way at once; more than one is asynchronous scheduling."""
    policy: str = "fcfs"
    v2: bool = False
    """Whether the scheduler works for vLLM's second model runner."""
    drafts: bool = False
    """Whether decoding is speculative."""
    crowded: bool = False
    """Whether a prompt is begun before there is room for all of it: requests preempt each other more."""


class World:
    """The model, its bundle, keys, and vLLM's configuration."""

    def __init__(self, model: Path, bundle: Path, keys: Path, monkeypatch: Any) -> None:
        self.monkeypatch = monkeypatch
        self.bundle, self._path = Bundle.load(bundle), str(bundle)
        self.keys = Keyring.generate()
        self.keys.save(keys)
        monkeypatch.setenv(KEY_FILE_ENV, str(keys))
        monkeypatch.setenv(AUDIENCE_ENV, "simulated")
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        # The installed vLLM is checked for the first scheduler, not again for each of hundreds.
        monkeypatch.setattr(compat, "check", functools.cache(compat.check))
        options = {
            "model": str(model),
            "dtype": "float32",
            "max_model_len": 384,
            "max_num_batched_tokens": CHUNK,
            "max_num_seqs": 6,
            "block_size": BLOCK,
            "enforce_eager": True,
            "additional_config": GuardConfig.for_bundle(str(bundle), self.bundle).entry(),
        }
        speculation = {"method": "ngram", "num_speculative_tokens": DRAFTS}
        self._plain = EngineArgs(**options).create_engine_config()
        self._drafting = EngineArgs(**options, speculative_config=speculation).create_engine_config()
        algorithm = get_hash_fn_by_name("sha256")
        init_none_hash(algorithm)
        self._hasher = get_request_block_hasher(BLOCK, algorithm)

    def scheduler(self, mode: Mode, default: Decision | None = None) -> Any:
        """``default`` is the engine's own policy in place of the bundle's."""
        config = copy.copy(self._drafting if mode.drafts else self._plain)
        if default is not None:
            config.additional_config = GuardConfig.for_bundle(self._path, self.bundle, default).entry()
        config.scheduler_config = copy.copy(config.scheduler_config)
        config.scheduler_config.async_scheduling = mode.queue > 1  # vLLM's CPU platform never does
        config.scheduler_config.policy = mode.policy
        config.scheduler_config.scheduler_reserve_full_isl = not mode.crowded
        config.cache_config.num_gpu_blocks = BLOCKS
        self.monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(mode.v2)))
        layer = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
        return guard_scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], layer)]
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )

    def request(
        self, name: str, prompt: list[int], asked: Asked, number: int = 0, salt: str | None = None
    ) -> Request:
        sealed = "forged"
        if (decision := DECISIONS.get(asked.order)) is not None:
            sealed = Directive.issue(decision, audience="simulated", body=b"").seal(self.keys)
        params = SamplingParams(
            max_tokens=asked.max_tokens,
            logprobs=asked.logprobs,
            prompt_logprobs=asked.logprobs,
            output_kind=RequestOutputKind.DELTA if asked.stream else RequestOutputKind.FINAL_ONLY,
            extra_args=None if asked.order == "none" else {EXTRA_ARG: sealed},
        )
        params.update_from_generation_config({}, eos_token_id=END)
        return Request(
            name,
            prompt,
            params,
            None,
            arrival_time=float(number),
            priority=asked.priority,
            cache_salt=salt,
            block_hasher=self._hasher,
        )
