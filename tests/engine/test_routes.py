"""vLLM's routes and request fields: each one upstream is open or closed on purpose, or a test fails."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from guard.engine.config import KEY_FILE_ENV
from guard.engine.frontend import GuardMiddleware
from guard.engine.routes import HARMLESS, JUDGED, is_open
from service.chat_body import ChatBody
from service.completion_body import CompletionBody
from service.fields import ADVICE, Strict

pytestmark = pytest.mark.filterwarnings("ignore", "error:::guard")  # vLLM and its dependencies warn a lot

CLOSED = {
    "other ways to generate": (
        *("/v1/responses", "/v1/messages", "/cohere/v2/chat", "/v1/chat/completions/batch"),
        *("/inference/v1/generate", "/invocations", "/v1/systemone", "/generative_scoring"),
        *("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime"),
    ),
    "stored answers, whoever they belong to": (
        *("/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"),
    ),
    "requests of others": ("/inference/v1/abort_requests", "/abort_requests"),
    "prompts on their way to another engine": (
        *("/v1/chat/completions/render", "/v1/completions/render", "/v1/messages/render"),
        *("/v1/responses/render", "/cohere/v2/chat/render"),
        *("/v1/chat/completions/derender", "/v1/completions/derender"),
    ),
    "activations that nobody judges": (
        *("/pooling", "/classify", "/v1/embeddings", "/v2/embed"),
        *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    ),
    "other weights": (
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/{adapter_name}"),
        *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
        *("/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version"),
    ),
    "control of the engine": (
        *("/collective_rpc", "/sleep", "/wake_up", "/is_sleeping", "/release_kv_cache_memory"),
        *("/pause", "/resume", "/is_paused", "/reset_prefix_cache", "/reset_mm_cache"),
        *("/reset_encoder_cache", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/start_profile"),
        *("/stop_profile", "/fault_tolerance/apply"),
    ),
    "not needed": (
        *("/server_info", "/tokenizer_info", "/weight_info", "/weight_checker", "/get_world_size"),
        *("/fault_tolerance/status", "/kv_event_sources", "/v1/messages/count_tokens", "/static"),
    ),
}
"""Routes that vLLM 0.32 can have and a guarded engine does not answer, by why."""


@pytest.fixture(scope="module")
def upstream() -> Iterator[set[str]]:
    """Every route that vLLM's own server registers, whatever the model and with every switch on."""
    from vllm import tasks
    from vllm.config import ProfilerConfig
    from vllm.entrypoints.launchers.app import build_app

    from guard.engine import compat

    with pytest.MonkeyPatch.context() as patch:
        for switch in (
            *("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
            *("VLLM_ENABLE_COHERE_API", "VLLM_NO_USAGE_STATS"),
        ):
            patch.setenv(switch, "1")
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = compat.server_parts().make_arg_parser(FlexibleArgumentParser())
        flags = ["--enable-scale-out", "--enable-offline-docs", "--enable-tokenizer-info-endpoint"]
        args = parser.parse_args([*flags, "--enable-fault-tolerance"])
        args.profiler_config = ProfilerConfig(profiler="torch", torch_profiler_dir="/tmp/unused")
        plain = parser.parse_args([])
        found = set[str]()
        generating = (*tasks.GENERATION_TASKS, *tasks.FRONTEND_TASKS)
        for chosen, served in ((plain, generating), *((args, (t,)) for t in tasks.POOLING_TASKS)):
            found |= _routes(build_app(chosen, served, _model(served[0])))
        yield found | _routes(build_app(args, generating, _model("generate")))


def _model(task: str) -> Any:
    from vllm import tasks

    return SimpleNamespace(
        get_pooling_task=lambda served: task if task in tasks.POOLING_TASKS else None,
        score_type=tasks.SCORE_TYPE_MAP.get(task),
        is_cross_encoder=True,
        pooler_config=None,
        hf_config=SimpleNamespace(num_labels=1),
    )


def _routes(app: Any) -> set[str]:
    return {route.path for route in app.routes}


def test_every_route_of_vllm_is_open_for_a_reason_or_closed_for_one(upstream):
    closed = {path for paths in CLOSED.values() for path in paths}
    assert not closed & {*JUDGED, *HARMLESS}
    assert upstream - {*JUDGED, *HARMLESS} - closed == set(), "new upstream: decide, and write down why"
    assert len(upstream) > 60, "the switches are meant to bring all routes"


def test_routes_of_the_table_are_really_there(upstream):
    """A route that vLLM has given up, or that was misspelt, must not stand in the table for ever.

    Those of Cohere need its SDK.
    """
    closed = {path for paths in CLOSED.values() for path in paths}
    assert {path for path in closed - upstream if not path.startswith("/cohere/")} == set()
    assert {*JUDGED, *HARMLESS} - upstream == {"/metrics/"}  # inside a mount


async def reached(path: str, kind: str = "http", **scope: Any) -> tuple[bool, list[dict[str, Any]]]:
    """Whether vLLM's application was asked, and what the client was sent."""
    asked, sent = [], []

    async def application(*_: Any) -> None:
        asked.append(path)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await GuardMiddleware(application)({"type": kind, "path": path, "headers": [], **scope}, receive, send)
    return bool(asked), sent


@pytest.fixture(autouse=True)
def _no_key_file(monkeypatch):
    monkeypatch.delenv(KEY_FILE_ENV, raising=False)


@pytest.mark.parametrize("path", [*JUDGED, *HARMLESS])
async def test_open_routes_reach_vllm(path):
    assert (await reached(path))[0]


@pytest.mark.parametrize("path", [path for paths in CLOSED.values() for path in paths])
async def test_closed_routes_do_not(path):
    asked, sent = await reached(path.replace("{response_id}", "resp_1").replace("{adapter_name}", "a"))
    assert (asked, sent[0]["status"]) == (False, 403)
    assert b"guard_route_closed" in sent[1]["body"]


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "//v1/chat/completions", "/v1/chat/completions/", "/V1/chat/completions"),
        *("/v1/chat/completions/../responses", "/v1/responses?x=/v1/completions", "/v1/future"),
        *("/v1/chat/completions\x00", "/v1/chat/completions ", "/health/x", "/metrics/../pause", "/docs/x"),
    ],
)
async def test_paths_that_only_look_like_open_ones_do_not(path):
    assert not (await reached(path))[0]


async def test_websockets_are_closed_before_they_open():
    for path in ("/v1/realtime", *JUDGED):
        asked, sent = await reached(path, "websocket")
        assert (asked, [message["type"] for message in sent]) == (False, ["websocket.close"])


@pytest.mark.parametrize("root", ["", "/api", "/v1", "/v1/chat"])
@pytest.mark.parametrize(
    "path", ["/api/v1/responses", "/v1/completions", "/v1", "/apix/health", "/v1/v1/models"]
)
def test_the_guard_and_vllms_router_see_the_same_path(root, path):
    from starlette._utils import get_route_path

    scope = {"type": "http", "path": path, "root_path": root}
    assert is_open(scope) == (get_route_path(scope) in {*JUDGED, *HARMLESS})


def known(model: type[Strict]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


UNADVISED = {
    *("mm_processor_kwargs", "media_io_kwargs", "length_penalty", "thinking_token_budget"),
    *("return_tokens_as_token_ids", "logprob_token_ids", "repetition_detection"),
    *("include_reasoning", "mm_payload", "return_mm_kwargs", "return_token_offsets", "stream_interval"),
    *("routed_experts_prompt_start", "watermarking"),
}
"""Fields of vLLM's that the gateway refuses with no more advice than to remove them."""


@pytest.mark.parametrize(
    ("place", "body"),
    [
        ("vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest", ChatBody),
        ("vllm.entrypoints.openai.completion.protocol:CompletionRequest", CompletionBody),
    ],
)
def test_every_field_of_vllm_is_accepted_or_refused_on_purpose(place, body):
    from importlib import import_module

    module, _, name = place.partition(":")
    fields = getattr(import_module(module), name).model_fields
    upstream = {field.alias or name for name, field in fields.items()}
    assert upstream - known(body) - ADVICE.keys() - UNADVISED == set(), "new upstream: decide"
