"""The body of ``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from service.fields import Generation

TokenId = Annotated[int, Field(ge=0)]


class CompletionBody(Generation):
    """What a client may send to ``/v1/completions``."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    """A text, token ids, or a list of either."""
    logprobs: int | None = None

    @property
    def prompts(self) -> int:
        """How many prompts the body holds."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return 1
        return len(self.prompt)

    @property
    def siblings(self) -> int:
        """How many answers the engine is asked for."""
        return self.prompts * (self.n or 1)
