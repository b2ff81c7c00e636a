"""Errors as the OpenAI API spells them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

RETRY_AFTER = {"retry-after": "2"}
STAGES = ("auth", "request", "backend", "directive", "verdict", "guard", "stream", "audit", "internal")
"""The parts that can fail. The first two are the client's own mistakes."""


class ConfigError(ValueError):
    """The gateway cannot start as configured. The message is one sentence for the operator."""


class ClientGoneError(Exception):
    """The client closed its connection before it was answered."""


class ApiError(Exception):
    """An answer to the client that is an error.

    ``stage`` names the part that failed, one of ``STAGES``, and labels ``guard_errors_total``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        stage: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message.encode("utf-8", "replace").decode("utf-8")  # a client may send lone surrogates
        self.code = code
        self.stage = stage
        self.kind = kind
        self.param = param and param.encode("utf-8", "replace").decode("utf-8")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body."""
        return error_body(self.message, kind=self.kind, code=self.code, param=self.param)

    def response(self) -> JSONResponse:
        """The HTTP answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def error_body(
    message: str, *, kind: str, code: str, param: str | None = None
) -> dict[str, dict[str, str | None]]:
    """OpenAI's error object; all four members are always there."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, *, code: str = "invalid_value", param: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, code=code, stage="request", param=param)


def unknown_model(model: str) -> ApiError:
    """404 for a model name that the engine does not serve."""
    shown = model if len(model) <= 100 else model[:100] + "…"
    return ApiError(
        404,
        f"The model '{shown}' does not exist. GET /v1/models lists what is served.",
        code="model_not_found",
        stage="request",
        param="model",
    )


def unavailable(message: str, *, code: str, stage: str) -> ApiError:
    """503: nothing is wrong with the request, and trying again later may work."""
    return ApiError(503, message, code=code, stage=stage, kind="server_error", headers=RETRY_AFTER)


def bad_upstream(message: str, *, code: str = "upstream_invalid") -> ApiError:
    """502: the engine answered with something that must not or cannot be passed on."""
    return ApiError(502, message, code=code, stage="backend", kind="server_error")
