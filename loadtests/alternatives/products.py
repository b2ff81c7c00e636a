"""Products of others, each in an installation of its own: LiteLLM's proxy, NeMo Guardrails, LLM Guard.

None of them gets weights: LiteLLM asks the guarded engine through its generic guardrail, NeMo Guardrails asks
the guard model from an action of an input rail, LLM Guard looks for substrings.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import yaml

from loadtests.alternatives.client import Target
from loadtests.alternatives.proxy import REFUSAL
from loadtests.alternatives.servers import Fleet, key_of

RAILS = f"""
define bot refuse to respond
  "{REFUSAL}"

define flow ask the guard model
  $unsafe = execute ask_guard_model
  if $unsafe
    bot refuse to respond
    stop
"""
ACTION = '''
"""The action of the input rail."""

import json
import os
from pathlib import Path

from aiohttp import ClientSession
from nemoguardrails.actions import action

from loadtests.alternatives.guard_model import judge

HARMFUL = frozenset(json.loads(Path(os.environ["BENCH_LABELS"]).read_text()))
sessions = []


@action(name="ask_guard_model", is_system_action=True)
async def ask_guard_model(context: dict | None = None):
    if not sessions:
        sessions.append(ClientSession())
    prompt = (context or {})["user_message"]
    return await judge(sessions[0], os.environ["BENCH_GUARD"], "nemo", HARMFUL, prompt)
'''


class Installations(NamedTuple):
    """Where the products are installed; None: left out."""

    litellm: Path | None = None
    """The command ``litellm``, of an installation of ``litellm[proxy]``."""
    nemo: Path | None = None
    """The command ``nemoguardrails``, of an installation of ``nemoguardrails[server]``."""
    llm_guard: Path | None = None
    """The Python of an installation of ``llm-guard`` and ``aiohttp``."""


def litellm(fleet: Fleet, command: Path, stock: str, gateway: str) -> Target:
    """LiteLLM's proxy in front of stock vLLM; its guardrail is the gateway's route for it."""
    config = {
        "model_list": [
            {
                "model_name": "model",
                "litellm_params": {"model": "openai/model", "api_base": f"{stock}/v1", "api_key": "none"},
            }
        ],
        "litellm_settings": {"telemetry": False, "drop_params": True, "num_retries": 0},
        "guardrails": [
            {
                "guardrail_name": "neuronguard",
                "litellm_params": {
                    "guardrail": "generic_guardrail_api",
                    "mode": "pre_call",
                    "api_base": gateway,
                    "api_key": key_of("litellm"),
                    "default_on": True,
                },
            }
        ],
    }
    file = fleet.folder / "litellm.yaml"
    file.write_text(yaml.safe_dump(config))
    server = fleet.start(
        "LiteLLM",
        lambda port: [str(command), "--config", str(file), "--host", "127.0.0.1", "--port", str(port)],
        "/health/liveliness",
        LITELLM_LOG="ERROR",
        LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY="true",
        LITELLM_LOCAL_MODEL_COST_MAP="true",
    )
    groups = ("guarded engine", "gateway", "stock engine", "LiteLLM")
    return Target("LiteLLM, this guard as guardrail", server.url, groups, {"authorization": "Bearer sk-any"})


def nemo(fleet: Fleet, command: Path, stock: str, guard: str, labels: Path) -> Target:
    """NeMo Guardrails' server in front of stock vLLM, with an input rail that asks the guard model."""
    folder = fleet.folder / "nemo"
    folder.mkdir()
    parameters = {"base_url": f"{stock}/v1", "api_key": "none"}
    config = {
        "models": [{"type": "main", "engine": "openai", "model": "model", "parameters": parameters}],
        "rails": {"input": {"flows": ["ask the guard model"]}},
        "passthrough": True,
        "streaming": True,
    }
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    (folder / "rails.co").write_text(RAILS)
    (folder / "actions.py").write_text(ACTION)
    server = fleet.start(
        "NeMo Guardrails",
        lambda port: [
            *(str(command), "server", "--config", str(folder), "--port", str(port), "--disable-chat-ui"),
            *("--default-config-id", folder.name),
        ],
        "/v1/rails/configs",
        PYTHONPATH=os.getcwd(),
        BENCH_GUARD=guard,
        BENCH_LABELS=str(labels),
        NEMO_GUARDRAILS_NO_USAGE_STATS="1",
    )
    groups = ("guard model", "stock engine", "NeMo Guardrails")
    return Target("NeMo Guardrails, guard model", server.url, groups)


def llm_guard(fleet: Fleet, python: Path, stock: str, harmful: list[str]) -> Target:
    """LLM Guard's scanner of substrings in a proxy in front of stock vLLM."""
    file = fleet.folder / "banned.json"
    file.write_text(json.dumps(harmful))
    url = fleet.proxy("llm_guard_proxy", "LLM Guard", str(python), generate=stock, banned=str(file))
    return Target("LLM Guard, substrings", url, ("stock engine", "LLM Guard"))
