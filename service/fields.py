"""The fields that both generating routes accept, and the 400 that names any other.

What is not declared in a body model is refused. This is a safety rule, not pedantry: several vLLM fields
change which prompt the model really sees, or what the guard reads of it, and vLLM ignores unknown fields in
silence, so that a misspelt one would look as if it had worked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import ApiError, bad_request
from service.strict_json import dump

_TEMPLATE = "It changes how the prompt ends, which is where the guard reads. Remove it."
_INTERNAL = "It reaches into the engine past the guard. Remove it."
_PROMPT = "It returns parts of the prompt, which this gateway does not do. Remove it."
_IDENTITY = "The gateway gives every request its own id. Send the header x-request-id to correlate."

Body = TypeVar("Body", bound=BaseModel)

ADVICE = {
    "vllm_xargs": _INTERNAL,
    "kv_transfer_params": _INTERNAL,
    "ec_transfer_params": _INTERNAL,
    "cache_salt": _INTERNAL,
    "priority": _INTERNAL,
    "prompt_embeds": "The guard cannot judge embeddings as a prompt. Send text or token ids as 'prompt'.",
    "chat_template": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    "add_generation_prompt": _TEMPLATE,
    "continue_final_message": _TEMPLATE,
    "add_special_tokens": _TEMPLATE,
    "truncate_prompt_tokens": _TEMPLATE,
    "truncation_side": _TEMPLATE,
    "documents": _TEMPLATE,
    "reasoning_effort": _TEMPLATE,
    "suffix": _TEMPLATE,
    "echo": _PROMPT,
    "prompt_logprobs": _PROMPT,
    "return_prompt_text": _PROMPT,
    "return_token_ids": _PROMPT,
    "use_beam_search": "Beam search is not supported. Use 'n' with a temperature.",
    "best_of": "'best_of' is not supported. Use 'n'.",
    "request_id": _IDENTITY,
    "session_id": _IDENTITY,
    "functions": "'functions' is deprecated. Use 'tools'.",
    "function_call": "'function_call' is deprecated. Use 'tool_choice'.",
    "guided_json": "Use 'structured_outputs' or 'response_format'.",
    "guided_regex": "Use 'structured_outputs' or 'response_format'.",
    "guided_choice": "Use 'structured_outputs' or 'response_format'.",
    "guided_grammar": "Use 'structured_outputs' or 'response_format'.",
    "image_url": "Only text can be sent: the guard was not fitted on anything else.",
    "continuous_usage_stats": "Only 'include_usage' is supported in 'stream_options'.",
}


class Strict(BaseModel):
    """Base of everything a client sends: no unknown field, no conversion between types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = None


class JsonSchema(Strict):
    """A schema that the answer must follow."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's structured output."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's structured output; exactly one of the first six, which vLLM checks."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


class Generation(Strict):
    """Fields that ``/v1/chat/completions`` and ``/v1/completions`` share.

    Fields marked ``exclude`` are accepted for the sake of clients and not forwarded, since nothing behind the
    gateway has a use for them.
    """

    model: str = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=0)
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None

    user: str | None = Field(default=None, exclude=True)
    safety_identifier: str | None = Field(default=None, exclude=True)
    prompt_cache_key: str | None = Field(default=None, exclude=True)
    metadata: dict[str, str] | None = Field(default=None, exclude=True)
    store: Literal[False] | None = Field(default=None, exclude=True)
    service_tier: Literal["auto", "default"] | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' may only be sent with 'stream': true")
        return self

    @property
    def streamed(self) -> bool:
        """Whether the answer comes as server-sent events."""
        return bool(self.stream)

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage frame."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def forwarded(self, added: Mapping[str, str] | None = None) -> bytes:
        """The body that goes to the engine: what the client set, of the fields that are forwarded.

        A null is left out: to OpenAI's clients it means "not set", which vLLM does not accept everywhere.
        ``added`` are the gateway's own fields.
        """
        body = self.model_dump(by_alias=True, exclude_unset=True)
        return dump({name: value for name, value in body.items() if value is not None} | dict(added or {}))


def validate(model: type[Body], value: dict[str, Any]) -> Body:
    """Check a parsed body against its model. Raises ApiError 400 that names the first wrong field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _explain(error, value) from None


def _explain(error: ValidationError, value: dict[str, Any]) -> ApiError:
    found = error.errors(include_url=False, include_input=False)
    # An unknown field is the clearest thing to say; of a failed union, the alternative that got furthest.
    first = next((item for item in found if item["type"] == "extra_forbidden"), None) or max(
        found, key=lambda item: len(_place(item["loc"], value))
    )
    place = _place(first["loc"], value)
    param = _spell(place) or None
    if first["type"] == "extra_forbidden":
        name = str(place[-1])[:100]
        advice = ADVICE.get(name, "Remove it, or check its spelling.")
        return bad_request(
            f"The field '{param}' is not accepted. {advice}", code="unknown_parameter", param=param
        )
    if first["type"] == "missing":
        return bad_request(f"The field '{param}' is missing.", code="missing_required_parameter", param=param)
    message = first["msg"].removeprefix("Value error, ")[:300]
    if first["type"] == "union_tag_invalid":  # pydantic's own words repeat the value, which may be anything
        message = "{discriminator} must be one of {expected_tags}".format(**first["ctx"])
    where = f"The field '{param}' is wrong: " if param else ""
    return bad_request(f"{where}{message}.", param=param)


def _place(loc: tuple[int | str, ...], value: Any) -> list[int | str]:
    """The part of a pydantic location that exists in the body, without the names of union members."""
    place: list[int | str] = []
    for index, part in enumerate(loc):
        if isinstance(part, int):
            found = isinstance(value, list) and part < len(value)
        else:
            found = isinstance(value, dict) and part in value
        if found:
            value = value[part]
            place.append(part)
        elif isinstance(value, dict) and index == len(loc) - 1:
            place.append(part)  # a missing field
    return place


def _spell(place: list[int | str]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")[:200]
