"""``worker_cls``: the platform's worker with taps. Scores ride to the scheduler on the step's own output.

Order of one step (vllm/v1/worker/gpu_worker.py): ``execute_model`` has the runner lay the batch out, at
which point the rows are staged (``guard.engine.runners``), and launches the forward pass, in which the taps
read; ``sample_tokens`` returns the step's output, to which the logits are attached. That output is a plain
dataclass and keeps an extra attribute across the process boundary.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.config.compilation import CompilationMode
from vllm.platforms import current_platform

from guard.engine.buffers import PendingScores
from guard.engine.config import GuardConfig
from guard.engine.donor import Donor, dynamic_patches, refuse_donor
from guard.engine.outputs import (
    IDLE_ATTRIBUTE,
    PREFIX_ATTRIBUTE,
    SLOTS_ATTRIBUTE,
    WATCHED_ATTRIBUTE,
    attach,
)
from guard.engine.patches import Patches
from guard.engine.quantisation import refuse_fused
from guard.engine.runners import stage_after_layout, tell
from guard.engine.sequence import SequenceTaps
from guard.engine.staging import Layout
from guard.engine.support import kv_slots, refuse_unsupported
from guard.engine.taps import Taps, site_layers

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

logger = logging.getLogger("vllm.neuronguard")


class GuardWorker(PlatformWorker):
    """Reads the bundle's units during the forward pass and scores them after it; patches on request."""

    taps: Taps | SequenceTaps
    patches: Patches
    _scores: PendingScores | None = None
    _running: PendingScores | None = None

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model, then hook the taps into it: before torch.compile or a CUDA graph sees it."""
        from vllm.distributed import get_tp_group

        refuse_unsupported(self.vllm_config)
        config = GuardConfig.of(self.vllm_config)
        bundle = config.load_bundle()
        refuse_donor(bundle, self.vllm_config, replayed=is_replayed(self.vllm_config))
        super().load_model(load_dummy_weights=load_dummy_weights)
        model, group = self.model_runner.get_model(), get_tp_group()
        refuse_fused(model, site_layers(bundle.card, model))
        common: dict[str, Any] = {
            "dtype": self.vllm_config.model_config.dtype,
            "device": self.device,
            "replayed": is_replayed(self.vllm_config),
            "rank": group.rank_in_group,
        }
        donor = None
        if dynamic_patches(bundle):
            with set_current_vllm_config(self.vllm_config):
                donor = Donor(bundle, model, self.vllm_config, config.donor)
        most = most_tokens(self.vllm_config)
        reading: dict[str, Any] = {
            "max_requests": self.vllm_config.scheduler_config.max_num_seqs,
            "all_reduce": group.all_reduce if group.world_size > 1 else None,
            **common,
        }
        if bundle.sequence is not None:
            self.taps = SequenceTaps(bundle, bundle.sequence, model, max_tokens=most, **reading)
        else:
            self.taps = Taps(bundle, model, **reading)
        # After the taps, whose hooks come first: a layer is read before it is changed.
        self.patches = Patches(bundle, model, max_tokens=most, **common)
        if donor is not None:
            donor.attach(self.patches, model, max_tokens=most, rank=group.rank_in_group)
        stage_after_layout(self.model_runner, self._stage)
        memory = self.taps.bytes + self.patches.bytes
        logger.info("the guard takes %.1f MiB beside the model", memory / 2**20)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Make the KV cache, and the table of scores that has its address space."""
        if isinstance(self.taps, SequenceTaps):
            self.taps.allocate(kv_slots(kv_cache_config, self.model_runner))
            logger.info("the scores of all tokens take %.1f MiB", self.taps.table_bytes / 2**20)
        super().initialize_from_config(kv_cache_config)

    def _stage(self, layout: Layout) -> None:
        self.taps.stage(layout)
        self.patches.stage(layout)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Launch the forward pass, then the probe on what its taps have read."""
        self.taps.begin(
            idle=getattr(scheduler_output, IDLE_ATTRIBUTE, False),
            watched=getattr(scheduler_output, WATCHED_ATTRIBUTE, False),
        )
        self.patches.begin(getattr(scheduler_output, SLOTS_ATTRIBUTE, None))
        if told := getattr(scheduler_output, PREFIX_ATTRIBUTE, None):
            tell(self.model_runner, told)
        output = super().execute_model(scheduler_output)
        self._scores = self.taps.score()
        self._running = self.taps.watch()
        self.taps.clear()  # what runs before the next step (dummy batches) is not read
        self.patches.clear()
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and attach the logits of the prompts that ended in this step."""
        scores, self._scores = self._scores, None
        running, self._running = self._running, None
        return attach(super().sample_tokens(grammar_output), scores, running)


def most_tokens(vllm_config: Any) -> int:
    """The most tokens that one forward pass can hold, padding of recorded graphs included."""
    recorded = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(int(vllm_config.scheduler_config.max_num_batched_tokens), int(recorded))


def is_replayed(vllm_config: Any) -> bool:
    """Whether the forward pass is compiled or recorded, so that no Python of ours runs in every step."""
    compilation = vllm_config.compilation_config
    return bool(
        compilation.mode != CompilationMode.NONE
        or compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    )
