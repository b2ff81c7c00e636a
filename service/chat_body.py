"""The body of ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from service.fields import Generation, Strict
from service.moderation import Moderation


class TextPart(Strict):
    """A piece of a message. Only text: the guard was not fitted on anything else."""

    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class _Instruction(Strict):
    content: Content
    name: str | None = None


class SystemMessage(_Instruction):
    """Instructions of the operator of an application."""

    role: Literal["system"]


class DeveloperMessage(_Instruction):
    """The same under its newer name."""

    role: Literal["developer"]


class UserMessage(_Instruction):
    """What the user says."""

    role: Literal["user"]


class FunctionCall(Strict):
    """A call that the model made."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call that the model made, with its id."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Strict):
    """An earlier answer. Clients send back what they got, so all that an answer's message has is accepted."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    function_call: None = Field(default=None, exclude=True)
    audio: None = Field(default=None, exclude=True)
    annotations: list[Any] | None = Field(default=None, max_length=0, exclude=True)


class ToolMessage(Strict):
    """The result of a call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str


Message = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class Function(Strict):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """Names one function."""

    name: str


class NamedTool(Strict):
    """Makes the model call this function."""

    type: Literal["function"]
    function: FunctionName


class ChatBody(Generation):
    """What a client may send to ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    moderation: Moderation | None = Field(default=None, exclude=True)
    modalities: list[Literal["text"]] | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _no_prefill(self) -> Self:
        if self.messages[-1].role == "assistant":
            # The template would add a new turn after it or continue it; neither ends as the guard expects.
            raise ValueError(
                "the last of 'messages' must not have the role 'assistant': "
                "prefilling an answer is not supported"
            )
        return self

    @property
    def siblings(self) -> int:
        """How many answers the engine is asked for."""
        return self.n or 1
