"""The description of the API is true: whatever a client sends, the answer is one that it lists."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.service.fake_engine import MODEL
from tests.service.world import Live, live

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture(scope="module")
def description(gateway: Live) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")


OPERATIONS = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /openai/deployments/{deployment}/chat/completions",
    "POST /openai/deployments/{deployment}/completions",
    "POST /v1/responses",
    "POST /v1/moderations",
    "POST /v1/guard/check",
    "POST /beta/litellm_basic_guardrail_api",
    "POST /api/v1/text/contents",
    "POST /admin/policies/reload",
    "GET /v1/models",
    "GET /v1/models/{model_id}",
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
)


def test_these_are_all_operations(description: schemathesis.BaseSchema) -> None:
    assert {result.ok().label for result in description.get_all_operations()} == set(OPERATIONS)


WITH_INPUT = [
    operation
    for operation in OPERATIONS
    if (operation.startswith("POST") or "{" in operation) and "/openai/" not in operation  # as /v1
]
SENT = [(operation, GenerationMode.POSITIVE) for operation in OPERATIONS] + [
    (operation, GenerationMode.NEGATIVE) for operation in WITH_INPUT
]


def meant(case: schemathesis.Case) -> None:
    """Make a request one that gets as far as the engine: about the served model, and about prompts."""
    if isinstance(case.body, dict):
        for name, value in (("model", MODEL), ("input_type", "request"), ("images", None)):
            if name in case.body:
                case.body[name] = value
    for name in case.path_parameters or ():
        case.path_parameters[name] = MODEL


@pytest.mark.parametrize(("operation", "mode"), SENT, ids=str)
def test_every_answer_is_a_described_one(
    operation: str, mode: GenerationMode, description: schemathesis.BaseSchema
) -> None:
    method, path = operation.split()
    strategy = description[path][method].as_strategy(generation_mode=mode)

    @given(strategy)
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def holds(case: schemathesis.Case) -> None:
        if mode is GenerationMode.POSITIVE:
            meant(case)
        statuses.add((response := case.call()).status_code)
        case.validate_response(response, checks=CHECKS)

    statuses = set[int]()
    holds()
    if mode is GenerationMode.POSITIVE:
        assert (404 if "responses" in path else 200) in statuses


GENERATING = ("POST /v1/chat/completions", "POST /v1/completions")


@pytest.mark.parametrize("outcome", ["pass", "refuse"])
@pytest.mark.parametrize("operation", GENERATING)
def test_every_streamed_answer_is_a_described_one(
    operation: str, outcome: str, gateway: Live, description: schemathesis.BaseSchema
) -> None:
    """Examples stream by themselves now and then only."""
    method, path = operation.split()
    gateway.engine.score = 0.97 if outcome == "refuse" else 0.01

    @given(description[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE))
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def holds(case: schemathesis.Case) -> None:
        meant(case)
        assert isinstance(case.body, dict)
        case.body["stream"] = True
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        seen.append((response.status_code, response.headers["content-type"][0].partition(";")[0]))
        if response.status_code == 200:
            assert response.headers["x-guard-action"] == [outcome]

    seen: list[tuple[int, str]] = []
    holds()
    assert set(seen) <= {(200, "text/event-stream"), (400, "application/json")}
    assert seen.count((200, "text/event-stream")) > 5
