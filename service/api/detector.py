"""``POST /api/v1/text/contents``: a detector for FMS Guardrails Orchestrator and TrustyAI, check only.

The *text contents* part of the Detectors API (foundation-model-stack.github.io/fms-guardrails-orchestrator,
openapi_detector_api.yaml). Each content that the policy flags has one detection, which spans all of it: the
guard judges a text as a whole. Its score is P(unsafe). Errors have the shape of that API.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from service.api_schemas import DETECTIONS
from service.checks import Finding, check_all, headers, limit_inputs, of_user
from service.errors import ApiError
from service.gateway import begin
from service.openapi import OF_A_BODY, answers, takes

router = APIRouter()

PATH = "/api/v1/text/contents"
DETECTOR_ID = "neuronguard"
DETECTION = "unsafe"

_ERRORS = (*(status for status in OF_A_BODY if status != 400), 422)

_HEADER = {
    "name": "detector-id",
    "in": "header",
    "required": True,
    "schema": {"type": "string", "enum": [DETECTOR_ID]},
}


class ContentsBody(BaseModel):
    """What an orchestrator sends."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    contents: list[str] = Field(min_length=1)
    detector_params: dict[str, Any] | None = None
    """Not looked at: thresholds are the policy's."""


@router.post(
    PATH,
    openapi_extra=takes(ContentsBody) | {"parameters": [_HEADER]},
    responses=answers(DETECTIONS, _ERRORS, shape="DetectorError"),
)
async def detect(request: Request) -> Response:
    """Say which texts are unsafe."""
    arrival = await begin(request, "checks")
    if request.headers.get("detector-id") != DETECTOR_ID:
        raise ApiError(
            404,
            f"The header 'detector-id' must be '{DETECTOR_ID}'.",
            code="detector_not_found",
            stage="request",
        )
    body = arrival.validate(ContentsBody)
    call = arrival.call(None)
    limit_inputs(call, len(body.contents), "contents")
    findings = iter(await check_all(call, [of_user(text) for text in body.contents if text]))
    label = call.lane.engine.status.label
    answer = [_detections(text, next(findings), label) if text else [] for text in body.contents]
    return JSONResponse(answer, headers=headers(call))


def _detections(text: str, finding: Finding, label: str) -> list[dict[str, Any]]:
    if not finding.flagged:
        return []
    return [
        {
            "start": 0,
            "end": len(text),
            "text": text,
            "detection": DETECTION,
            "detection_type": label,
            "detector_id": DETECTOR_ID,
            "score": finding.verdict.probability,
        }
    ]


def error_response(error: ApiError) -> JSONResponse:
    """An error as this API spells it."""
    status = 422 if error.status == 400 else error.status
    return JSONResponse({"code": error.code, "message": error.message}, status, headers=error.headers)
