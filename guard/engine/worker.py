"""``worker_cls``: the platform's worker with taps. Scores ride to the scheduler on the step's own output.

Order of one step (vllm/v1/worker/gpu_model_runner.py): ``execute_model`` lays the batch out in
``_prepare_inputs``, which is wrapped here to stage the rows, and runs the forward pass, in which the taps
read; ``sample_tokens`` returns the ``ModelRunnerOutput``, to which the logits are attached. That output is a
plain dataclass and keeps an extra attribute across the process boundary.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.outputs import ModelRunnerOutput

from guard.engine.config import GuardConfig
from guard.engine.errors import GuardStartupError
from guard.engine.support import refuse_unsupported
from guard.engine.taps import Taps

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

LOGITS_ATTRIBUTE = "neuronguard_logits"
"""Name of the extra attribute of ``ModelRunnerOutput``: ``{request id: raw logit}``."""


class GuardWorker(PlatformWorker):
    """Reads the bundle's units during the forward pass and scores them after it."""

    taps: Taps

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model, then hook the taps into it."""
        refuse_unsupported(self.vllm_config)
        bundle = GuardConfig.of(self.vllm_config).load_bundle()
        super().load_model(load_dummy_weights=load_dummy_weights)
        runner = self.model_runner
        if not hasattr(runner, "_prepare_inputs"):
            raise GuardStartupError("this vLLM uses a model runner whose batches the guard cannot read")
        self.taps = Taps(bundle, self.vllm_config.scheduler_config.max_num_seqs, self.device)
        self.taps.install(runner.get_model())
        _stage_after_layout(runner, self.taps)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the forward pass; whatever it does not stage is not read."""
        self.taps.staging.clear()
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and attach the logits of the prompts that ended in this step."""
        output = super().sample_tokens(grammar_output)
        logits = self.taps.logits()
        if logits:
            if not isinstance(output, ModelRunnerOutput):
                raise RuntimeError(f"the guard cannot attach its scores to a {type(output).__name__}")
            setattr(output, LOGITS_ATTRIBUTE, logits)
        return output


def _stage_after_layout(runner: Any, taps: Taps) -> None:
    prepare = runner._prepare_inputs

    def prepare_and_stage(scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = prepare(scheduler_output, num_scheduled_tokens)
        batch = runner.input_batch
        taps.staging.stage(
            batch.req_ids, runner.query_start_loc.np, batch.num_computed_tokens_cpu, batch.num_prompt_tokens
        )
        return prepared

    runner._prepare_inputs = prepare_and_stage
