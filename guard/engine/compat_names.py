"""The parts of vLLM that the guard relies on, by name. vLLM promises nothing about any of them.

To rely on one more, add a line here and run ``make compat ARGS=--signatures``, which reads its signature out
of every known version into ``compat_table.json``.
"""

from __future__ import annotations

from typing import Final

_SCHEDULER: Final = "vllm.v1.core.sched.scheduler:Scheduler"
_WORKER: Final = "vllm.v1.worker.gpu_worker:Worker"
_V1: Final = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V2: Final = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_PROCESSOR: Final = "vllm.v1.engine.output_processor:OutputProcessor"

CALLABLES: Final[dict[str, tuple[str, ...]]] = {
    f"{_SCHEDULER}.__init__": (),
    f"{_SCHEDULER}.add_request": ("request",),
    f"{_SCHEDULER}.schedule": (),
    f"{_SCHEDULER}.update_from_output": ("scheduler_output", "model_runner_output"),
    f"{_SCHEDULER}.finish_requests": ("request_ids", "finished_status"),
    f"{_SCHEDULER}._free_request": ("request", "delay_free_blocks"),
    f"{_SCHEDULER}._preempt_request": ("request", "timestamp", "drop_stale_output"),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler.__init__": (),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler.update_from_output": (
        "scheduler_output",
        "model_runner_output",
    ),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule": ("scheduler_output",),
    f"{_WORKER}.load_model": ("load_dummy_weights",),
    f"{_WORKER}.execute_model": ("scheduler_output",),
    f"{_WORKER}.sample_tokens": ("grammar_output",),
    "vllm.v1.worker.cpu_worker:CPUWorker.__init__": (),
    "vllm.v1.worker.cpu_worker:CPUWorker.load_model": ("load_dummy_weights",),
    "vllm.v1.worker.cpu_worker:CPUWorker.execute_model": ("scheduler_output",),
    "vllm.v1.worker.cpu_worker:CPUWorker.sample_tokens": ("grammar_output",),
    f"{_V1}._prepare_inputs": ("scheduler_output", "num_scheduled_tokens"),
    f"{_V1}.execute_model": ("scheduler_output",),
    f"{_V1}.sample_tokens": ("grammar_output",),
    f"{_V1}.get_model": (),
    f"{_V2}.prepare_inputs": ("scheduler_output",),
    f"{_V2}.execute_model": ("scheduler_output",),
    f"{_V2}.sample_tokens": ("grammar_output",),
    f"{_V2}.get_model": (),
    "vllm.v1.outputs:AsyncModelRunnerOutput.get_output": (),
    f"{_PROCESSOR}.add_request": ("request", "prompt", "parent_req", "request_index", "queue"),
    f"{_PROCESSOR}.process_outputs": ("engine_core_outputs",),
    "vllm.distributed.parallel_state:get_tp_group": (),
    "vllm.v1.request:Request.take_events": (),
    "vllm.v1.request:Request.take_prefill_stats": (),
    "vllm.v1.request:Request.is_finished": (),
    "vllm.v1.request:Request.get_finished_reason": (),
    "vllm.entrypoints.launchers.cli_args:make_arg_parser": ("parser",),
    "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args": ("args",),
    "vllm.entrypoints.common.cli_args:make_arg_parser": ("parser",),
    "vllm.entrypoints.common.cli_args:validate_parsed_serve_args": ("args",),
    "vllm.entrypoints.serve.utils.api_utils:cli_env_setup": (),
    "vllm.entrypoints.common.startup:cli_env_setup": (),
    "vllm.entrypoints.launchers.api_server.entry:run_server": ("args",),
    "vllm.logger:configure_logging_from_args": ("args",),
}
"""Functions that the guard calls, overrides or wraps, each with the parameters it passes on or reads."""

MEMBERS: Final[dict[str, tuple[str, ...]]] = {
    _SCHEDULER: ("requests", "kv_cache_manager", "vllm_config"),
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
    "vllm.v1.core.sched.output:SchedulerOutput": ("num_scheduled_tokens", "finished_req_ids"),
    "vllm.v1.request:Request": (
        "cache_salt",
        "client_index",
        "drop_stale_output",
        "lora_request",
        "mm_features",
        "num_prompt_tokens",
        "num_stale_output_tokens",
        "prompt_embeds",
        "prompt_token_ids",
        "resumable",
        "stop_reason",
        "trace_headers",
    ),
    "vllm.config.vllm:VllmConfig": (
        "additional_config",
        "cache_config",
        "compilation_config",
        "kv_transfer_config",
        "lora_config",
        "model_config",
        "parallel_config",
        "scheduler_config",
        "speculative_config",
        "use_v2_model_runner",
        "weight_transfer_config",
    ),
    "vllm.config.parallel:ParallelConfig": (
        "_api_process_count",
        "data_parallel_external_lb",
        "data_parallel_hybrid_lb",
        "data_parallel_size",
        "data_parallel_size_local",
        "decode_context_parallel_size",
        "distributed_executor_backend",
        "enable_expert_parallel",
        "nnodes",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "tensor_parallel_size",
        "use_ubatching",
        "world_size",
    ),
    "vllm.config.scheduler:SchedulerConfig": ("async_scheduling", "max_num_seqs"),
    "vllm.config.model:ModelConfig": (
        "architectures",
        "dtype",
        "enable_prompt_embeds",
        "enable_sleep_mode",
        "enforce_eager",
        "hf_text_config",
        "is_encoder_decoder",
        "is_multimodal_model",
        "max_model_len",
        "quantization",
        "runner_type",
        "using_transformers_backend",
    ),
    "vllm.config.cache:CacheConfig": ("kv_sharing_fast_prefill",),
    "vllm.config.compilation:CompilationConfig": ("cudagraph_mode", "mode", "pass_config"),
    "vllm.config.compilation:CompilationMode": ("NONE",),
    "vllm.config.compilation:CUDAGraphMode": ("NONE",),
    "vllm.config.compilation:PassConfig": ("enable_sp",),
    "vllm.config.lora:LoRAConfig": ("max_loras",),
    "vllm.config.speculative:SpeculativeConfig": ("method",),
    "vllm.distributed.parallel_state:GroupCoordinator": ("all_reduce", "rank_in_group", "world_size"),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": ("lora_requests",),
    "vllm.lora.layers.row_parallel_linear:RowParallelLinearWithLoRA": ("base_layer",),
    "vllm.lora.request:LoRARequest": ("load_inplace", "lora_name", "lora_path"),
    "vllm.model_executor.layers.linear:RowParallelLinear": (
        "input_is_parallel",
        "input_size",
        "input_size_per_partition",
        "tp_rank",
    ),
    _V1: ("input_batch", "query_start_loc"),
    "vllm.v1.worker.gpu_input_batch:InputBatch": ("req_ids", "num_computed_tokens_cpu", "num_prompt_tokens"),
    _V2: ("req_states",),
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        "req_ids",
        "query_start_loc_np",
        "num_computed_tokens_np",
        "idx_mapping_np",
    ),
    "vllm.v1.worker.gpu.states:RequestState": ("prompt_len",),
}
"""Classes, each with the fields, attributes and methods of its objects that the guard reads or writes."""

_MOVED: Final = "parts of the API server are looked for where 0.33 moved them, too"

ADAPTED: Final[dict[str, str]] = {
    f"{_V2}.prepare_inputs": "runner V2's `prepare_inputs` is wrapped with whatever arguments it gets",
    f"{_V2}.execute_model": "runner V2's `execute_model` is called by vLLM's worker alone",
    f"{_PROCESSOR}.process_outputs": "`process_outputs` gets all its arguments handed through",
    "vllm.config.compilation:PassConfig": "`enable_sp` is refused where there is one (until 0.31)",
    "vllm.v1.outputs:ModelRunnerOutput": "`prompt_token_id_logprobs_dict` is cleared from 0.31 on",
    "vllm.entrypoints.launchers.cli_args:make_arg_parser": _MOVED,
    "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args": _MOVED,
    "vllm.entrypoints.common.cli_args:make_arg_parser": _MOVED,
    "vllm.entrypoints.common.cli_args:validate_parsed_serve_args": _MOVED,
    "vllm.entrypoints.serve.utils.api_utils:cli_env_setup": _MOVED,
    "vllm.entrypoints.common.startup:cli_env_setup": _MOVED,
    "vllm.logger:configure_logging_from_args": "logging follows the arguments from 0.31 on",
}
"""What is not the same in all known versions, and how the guard copes."""
