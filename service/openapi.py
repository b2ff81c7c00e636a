"""``/openapi.json``: bodies are read and answers are written by hand, so their schemas are added by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.api_schemas import DETECTOR_ERROR, ERROR, Schema

_REF = "#/components/schemas/{model}"
_bodies: list[type[BaseModel]] = []

_WHY = {
    400: "The request is wrong, or refused by a policy whose style says so.",
    401: "No known API key.",
    403: "The API key lacks a right, or a policy refuses by this status.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    409: "The policy file is wrong; the old policies stay in force.",
    413: "The body is too long.",
    415: "The body is not JSON.",
    422: "The request is wrong.",
    429: "The key's limits are reached, or the engine is overloaded.",
    500: "The gateway failed.",
    502: "The engine's answer cannot be passed on.",
    503: "Not checked and so not answered, or nobody to answer; try again later.",
    504: "The engine did not answer in time.",
}
_KEYS: dict[str, Schema] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
}
OF_A_BODY = (400, 401, 403, 404, 408, 413, 415, 429, 500, 502, 503, 504)
"""Error statuses of routes that send a body to an engine."""
WITHOUT_A_BODY = (401, 403, 404, 500, 503)
"""Error statuses of routes that only look something up."""


def takes(body: type[BaseModel]) -> dict[str, Any]:
    """The ``openapi_extra`` of a route with this body."""
    if body not in _bodies:
        _bodies.append(body)
    schema = {"$ref": _REF.format(model=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answers(
    schema: Schema | None, errors: tuple[int, ...] = (), *, stream: bool = False, shape: str = "Error"
) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route: its good answer, and errors of the ``shape`` named."""
    found: dict[int | str, dict[str, Any]] = {}
    if schema is not None:
        content: dict[str, Any] = {"application/json": {"schema": schema}}
        if stream:
            # Of one event: its data is a chunk as JSON, or [DONE].
            event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
            content["text/event-stream"] = {"schema": event}
        found[200] = {"description": "The answer.", "content": content}
    error = {"application/json": {"schema": {"$ref": _REF.format(model=shape)}}}
    for status in errors:
        found[status] = {"description": _WHY[status], "content": error}
    return found


def document(app: FastAPI) -> dict[str, Any]:
    """The whole description of the API."""
    if not app.openapi_schema:
        described = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, schemas = models_json_schema([(body, "validation") for body in _bodies], ref_template=_REF)
        components = described.setdefault("components", {})
        components["schemas"] = schemas["$defs"] | {"Error": ERROR, "DetectorError": DETECTOR_ERROR}
        components["securitySchemes"] = _KEYS
        for path, methods in described["paths"].items():
            for operation in methods.values():
                # FastAPI adds this for every path parameter; ours take any text.
                if operation["responses"].get("422", {}).get("description") == "Validation Error":
                    del operation["responses"]["422"]
                if path.startswith(("/v1", "/openai", "/api", "/beta", "/admin")):
                    operation["security"] = [{name: []} for name in _KEYS]
        app.openapi_schema = described
    return app.openapi_schema
