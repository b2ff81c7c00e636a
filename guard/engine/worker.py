"""``worker_cls``: the platform's worker with taps. Scores ride to the scheduler on the step's own output.

Order of one step (vllm/v1/worker/gpu_worker.py): ``execute_model`` has the runner lay the batch out, at
which point the rows are staged (``guard.engine.runners``), and launches the forward pass, in which the taps
read; ``sample_tokens`` returns the step's output, to which the logits are attached. That output is a plain
dataclass and keeps an extra attribute across the process boundary.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.config.compilation import CompilationMode
from vllm.platforms import current_platform

from guard.engine.buffers import PendingScores
from guard.engine.config import GuardConfig
from guard.engine.outputs import IDLE_ATTRIBUTE, attach
from guard.engine.quantisation import refuse_fused
from guard.engine.runners import stage_after_layout
from guard.engine.support import refuse_unsupported
from guard.engine.taps import Taps, site_layers

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

logger = logging.getLogger("vllm.neuronguard")


class GuardWorker(PlatformWorker):
    """Reads the bundle's units during the forward pass and scores them after it."""

    taps: Taps
    _scores: PendingScores | None = None

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model, then hook the taps into it: before torch.compile or a CUDA graph sees it."""
        from vllm.distributed import get_tp_group

        refuse_unsupported(self.vllm_config)
        bundle = GuardConfig.of(self.vllm_config).load_bundle()
        super().load_model(load_dummy_weights=load_dummy_weights)
        model, group = self.model_runner.get_model(), get_tp_group()
        refuse_fused(model, site_layers(bundle.card, model))
        self.taps = Taps(
            bundle,
            model,
            max_requests=self.vllm_config.scheduler_config.max_num_seqs,
            dtype=self.vllm_config.model_config.dtype,
            device=self.device,
            replayed=is_replayed(self.vllm_config),
            rank=group.rank_in_group,
            all_reduce=group.all_reduce if group.world_size > 1 else None,
        )
        stage_after_layout(self.model_runner, self.taps.stage)
        logger.info("the guard takes %.1f MiB beside the model", self.taps.bytes / 2**20)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Launch the forward pass, then the probe on what its taps have read."""
        self.taps.begin(idle=getattr(scheduler_output, IDLE_ATTRIBUTE, False))
        output = super().execute_model(scheduler_output)
        self._scores = self.taps.score()
        self.taps.clear()  # what runs before the next step (dummy batches) is not read
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and attach the logits of the prompts that ended in this step."""
        scores, self._scores = self._scores, None
        return attach(super().sample_tokens(grammar_output), scores)


def is_replayed(vllm_config: Any) -> bool:
    """Whether the forward pass is compiled or recorded, so that no Python of ours runs in every step."""
    compilation = vllm_config.compilation_config
    return bool(
        compilation.mode != CompilationMode.NONE
        or compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    )
