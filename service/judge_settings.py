"""What the policy file says about a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from service.policy import FileModel


class Judge(FileModel):
    """An OpenAI-compatible server that is asked about requests in an uncertain band."""

    base_url: Annotated[str, Field(pattern=r"^https?://[^\s/]+(/[^\s]*)?$")]
    """Up to and with ``/v1``; ``/chat/completions`` is added."""
    model: Annotated[str, Field(min_length=1)]
    timeout_s: float = Field(default=2.0, gt=0, le=60)
    """Deadline in seconds for the whole question."""
    on_error: Literal["refuse", "pass"] = "refuse"
    """What happens to the request when the judge does not say one of its two words in time."""
    style: Literal["plain", "llama-guard"] = "plain"
    """``plain``: an instruction and the conversation as JSON. ``llama-guard``: the conversation itself, for
    models whose chat template holds the instruction. Both answer with ``safe`` or ``unsafe`` first."""
    api_key_file: Annotated[str, Field(min_length=1)] | None = None
    """File with the judge's API key."""
    max_concurrent: int = Field(default=64, ge=1, le=4096)
    """Questions at one time; a further one counts as an error at once."""

    def api_key(self) -> str | None:
        """The key for the judge. Raises OSError and ValueError when its file cannot be used."""
        if self.api_key_file is None:
            return None
        key = Path(self.api_key_file).read_text("ascii").strip()
        if not key or not key.isprintable() or " " in key:
            raise ValueError("it does not hold one key")
        return key
