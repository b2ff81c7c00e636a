"""A guarded model in Ray Serve LLM: ``serve run deploy.ray.serve_guarded:app model=DIR bundle=DIR …``.

Ray's own ingress calls vLLM's classes and leaves its HTTP application out, and with it the guard's
middleware; the engine then answers nobody. With direct streaming each replica serves vLLM's application
itself, which has the middleware. So RAY_SERVE_ENABLE_HA_PROXY=1 and RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1
have to be in the environment of Ray, on every node: docs/guides/ray-serve.md
"""

from __future__ import annotations

import os
import secrets
from typing import Any

import yaml


def engine_kwargs(bundle: str) -> dict[str, Any]:
    """What vLLM has to be told of the guard, as ``neuronguard bundle flags`` says it. Raises BundleError."""
    from guard.bundle import Bundle
    from guard.engine.config import GuardConfig

    flags = GuardConfig.for_bundle(bundle, Bundle.load(bundle)).flags()
    return {
        "worker_cls": flags["worker-cls"],
        "scheduler_cls": flags["scheduler-cls"],
        "middleware": [flags["middleware"]],
        "additional_config": yaml.safe_load(flags["additional-config"]),
    }


def app(arguments: dict[str, str]) -> Any:
    """Arguments: model, bundle, name, key_file, accelerator (cpu or gpu), and vllm: its flags as YAML."""
    from ray.serve.llm import LLMConfig, build_openai_app
    from ray.serve.llm import LLMServingArgs as Arguments

    if os.environ.get("RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING") != "1":
        raise RuntimeError("set RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1: without it no request is answered")
    environment = {
        "NEURONGUARD_KEY_FILE": arguments["key_file"],
        # One name for all replicas, because Ray chooses among them; another one at every start.
        "NEURONGUARD_AUDIENCE": f"ray-{secrets.token_hex(8)}",
        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    }
    config = LLMConfig(
        model_loading_config={"model_id": arguments["name"], "model_source": arguments["model"]},
        engine_kwargs=engine_kwargs(arguments["bundle"]) | yaml.safe_load(arguments.get("vllm", "{}")),
        accelerator_config={"kind": arguments.get("accelerator", "gpu")},
        deployment_config={"num_replicas": 1},
        runtime_env={"env_vars": environment},
    )
    return build_openai_app(Arguments(llm_configs=[config]))
