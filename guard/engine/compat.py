"""Every vLLM internal the guard relies on, by name and signature, checked before the engine starts.

vLLM promises nothing about these. A version that was not run is refused, and so is a known version whose
signatures are not those listed: better no engine than one whose guard reads something else.
"""

from __future__ import annotations

import importlib
import inspect
import os
from typing import Any

from guard.engine.errors import GuardStartupError

TESTED_MINOR_VERSIONS = ("0.32",)
OVERRIDE_ENV = "NEURONGUARD_UNTESTED_VLLM"

# Parameters by name: (callable, names the guard passes on or reads). Order matters.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        "self",
        "scheduler_output",
        "model_runner_output",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.finish_requests": ("self", "request_ids", "finished_status"),
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": ("self", "request", "delay_free_blocks"),
    "vllm.v1.worker.gpu_worker:Worker.load_model": ("self", "load_dummy_weights"),
    "vllm.v1.worker.gpu_worker:Worker.execute_model": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu_worker:Worker.sample_tokens": ("self", "grammar_output"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": (
        "self",
        "scheduler_output",
        "num_scheduled_tokens",
    ),
    "vllm.v1.engine.output_processor:OutputProcessor.add_request": (
        "self",
        "request",
        "prompt",
        "parent_req",
        "request_index",
        "queue",
    ),
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": (
        "self",
        "engine_core_outputs",
        "engine_core_timestamp",
        "iteration_stats",
        "weight_version",
    ),
    "vllm.v1.request:Request.take_events": ("self",),
    "vllm.v1.request:Request.take_prefill_stats": ("self",),
}

# Fields of vLLM's data classes that the guard reads or writes.
FIELDS: dict[str, tuple[str, ...]] = {
    "vllm.v1.outputs:ModelRunnerOutput": (
        "req_id_to_index",
        "sampled_token_ids",
        "prompt_logprobs_dict",
        "prompt_token_id_logprobs_dict",
    ),
    "vllm.v1.engine:EngineCoreOutput": (
        "request_id",
        "new_token_ids",
        "new_logprobs",
        "finish_reason",
        "stop_reason",
        "events",
        "kv_transfer_params",
        "trace_headers",
        "prefill_stats",
    ),
    "vllm.v1.engine:EngineCoreOutputs": ("outputs",),
    "vllm.v1.engine:EngineCoreRequest": ("request_id", "prompt_token_ids", "sampling_params"),
    "vllm.v1.core.sched.output:SchedulerOutput": ("num_scheduled_tokens",),
}


def check() -> str:
    """Check the installed vLLM and return its version. Raises GuardStartupError."""
    try:
        import vllm
    except ImportError as error:
        raise GuardStartupError(
            f"vLLM is not installed ({error}); install neuronguard[cpu] or neuronguard[cuda]"
        ) from error
    version = str(vllm.__version__)
    if not any(version.startswith(minor + ".") for minor in TESTED_MINOR_VERSIONS):
        tested = ", ".join(f"{minor}.x" for minor in TESTED_MINOR_VERSIONS)
        if os.environ.get(OVERRIDE_ENV) != version:
            raise GuardStartupError(
                f"vLLM {version} is installed, but this version of the guard was run on {tested} only; "
                f"install one of those, or set {OVERRIDE_ENV}={version} to try at your own risk"
            )
    wrong = [problem for name, expected in SIGNATURES.items() if (problem := _signature(name, expected))]
    wrong += [problem for name, expected in FIELDS.items() if (problem := _fields(name, expected))]
    if wrong:
        raise GuardStartupError(f"vLLM {version} is not laid out as the guard expects: {'; '.join(wrong)}")
    return version


def _resolve(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _signature(name: str, expected: tuple[str, ...]) -> str | None:
    try:
        found = tuple(inspect.signature(_resolve(name)).parameters)
    except (ImportError, AttributeError) as error:
        return f"{name} is missing ({error})"
    return None if found == expected else f"{name}{found}, expected {expected}"


def _fields(name: str, expected: tuple[str, ...]) -> str | None:
    try:
        cls = _resolve(name)
    except (ImportError, AttributeError) as error:
        return f"{name} is missing ({error})"
    known = set(getattr(cls, "__struct_fields__", ())) | set(getattr(cls, "__dataclass_fields__", ()))
    missing = [field for field in expected if field not in known]
    return f"{name} has no field {', '.join(missing)}" if missing else None
