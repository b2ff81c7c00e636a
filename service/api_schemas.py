"""What the routes answer, as JSON Schemas for ``/openapi.json``.

Answers of the engine are passed on as they are, so that only what the gateway relies on is promised of them.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
NULLABLE_STRING: Schema = {"type": ["string", "null"]}


def listed(items: Schema) -> Schema:
    """An array."""
    return {"type": "array", "items": items}


def record(optional: Schema | None = None, /, **members: Schema) -> Schema:
    """An object with these members, all of them required but the ``optional`` ones."""
    return {"type": "object", "properties": members | (optional or {}), "required": list(members)}


ERROR = record(
    error={
        **record(message=STRING, type=STRING, param=NULLABLE_STRING, code=NULLABLE_STRING),
        "description": "OpenAI's error object; Azure's members are added in its style.",
    }
)
DETECTOR_ERROR = record(code=STRING, message=STRING)
USAGE = record(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER)
COMPLETION = record({"usage": USAGE, "moderation": {"type": "object"}}, choices=listed({"type": "object"}))
MODEL = record(
    id=STRING,
    object={"const": "model"},
    created=INTEGER,
    owned_by=STRING,
    parent=NULLABLE_STRING,
    max_model_len=INTEGER,
)
MODELS = record(object={"const": "list"}, data=listed(MODEL))
MODERATIONS = record(
    id=STRING,
    model=STRING,
    results=listed(
        record(
            flagged=BOOLEAN,
            categories={"type": "object", "additionalProperties": BOOLEAN},
            category_scores={"type": "object", "additionalProperties": NUMBER},
            category_applied_input_types={"type": "object", "additionalProperties": listed(STRING)},
        )
    ),
)
VERDICT = record(
    probability=NUMBER,
    logit={"type": ["number", "null"]},
    threshold={"type": ["number", "null"]},
    unsafe=BOOLEAN,
    bundle=STRING,
    read=STRING,
    unscored_shape=BOOLEAN,
    prompt_tokens=INTEGER,
)
CHECK = record(
    id=STRING,
    object={"const": "guard.check"},
    model=STRING,
    policy=STRING,
    mode=STRING,
    results=listed(
        record(
            flagged=BOOLEAN,
            decision={"enum": ["pass", "tag", "patch", "refuse"]},
            escalated=BOOLEAN,
            verdict=VERDICT,
        )
    ),
)
GUARDRAIL = record({"blocked_reason": STRING}, action={"enum": ["BLOCKED", "NONE"]})
DETECTIONS = listed(
    listed(
        record(
            start=INTEGER,
            end=INTEGER,
            text=STRING,
            detection=STRING,
            detection_type=STRING,
            detector_id=STRING,
            score=NUMBER,
        )
    )
)
HEALTH = record({"detail": STRING}, status=STRING)
RELOADED = record(policies=listed(STRING))
