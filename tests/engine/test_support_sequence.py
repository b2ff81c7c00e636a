"""Where a sequence probe cannot be served, and says so at start-up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from guard.engine.errors import GuardStartupError
from tests.engine.cards import card

pytestmark = [  # vLLM and its dependencies warn a lot
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::guard"),
]
FIRST_RUNNER = SimpleNamespace(_prepare_inputs=None)


def cache(*kinds: str, blocks: int = 10) -> Any:
    """A KV cache with one group of layers for each kind, of vLLM's own classes."""
    import torch
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )

    sizes = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    made = {"full": FullAttentionSpec(**sizes), "window": SlidingWindowSpec(**sizes, sliding_window=64)}
    groups = [KVCacheGroupSpec([f"layer {i}"], made[kind]) for i, kind in enumerate(kinds)]
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def test_the_table_has_a_row_for_every_slot():
    from guard.engine.support import kv_slots

    assert kv_slots(cache("full"), FIRST_RUNNER) == 160


@pytest.mark.parametrize("kinds", [("window",), ("full", "window"), ("full", "full"), ()])
def test_caches_in_which_tokens_lose_their_slots_are_refused_by_name(kinds):
    from guard.engine.support import kv_slots

    with pytest.raises(GuardStartupError, match="one kind of cache, with full attention"):
        kv_slots(cache(*kinds), FIRST_RUNNER)


def test_the_second_model_runner_is_refused_by_name():
    from guard.engine.support import kv_slots

    with pytest.raises(GuardStartupError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        kv_slots(cache("full"), SimpleNamespace(prepare_inputs=None))


@pytest.mark.parametrize(
    ("probe", "speculative", "watches"),
    [("sequence", None, True), ("sequence", object(), False), ("linear", None, False)],
)
def test_answers_are_watched_by_sequence_probes_without_drafts(probe, speculative, watches):
    from guard.engine.support import can_watch
    from guard.pooling import Pooling

    made = card(probe=probe, pooling=Pooling(kind="rolling") if probe == "sequence" else None)
    assert can_watch(made, SimpleNamespace(speculative_config=speculative)) == watches
