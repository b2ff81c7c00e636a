"""Which of vLLM's routes a guarded engine answers: those listed here, and no others.

vLLM 0.32 can register some seventy routes (vllm/entrypoints/launchers/api_server/routers.py), and plugins
can add more. Every request that generates ends in the scheduler and is judged there whatever route it came
by, but some routes show more than answers: stored answers of others, log probabilities of text that nobody
generated, weights. So what is not known is closed, also when a later vLLM brings it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

JUDGED = ("/v1/chat/completions", "/v1/completions")
"""Lead to the model: every request that they make in the engine gets a verdict."""

HARMLESS = (
    *("/health", "/ping", "/load", "/version", "/metrics", "/metrics/", "/v1/models"),
    *("/tokenize", "/detokenize"),
    *("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"),
)
"""Show nothing of the model but its name and its tokenizer."""

_OPEN = frozenset((*JUDGED, *HARMLESS))


def is_open(scope: Mapping[str, Any]) -> bool:
    """Whether an ASGI scope of an HTTP request asks for a listed route."""
    return _route_path(scope) in _OPEN


def _route_path(scope: Mapping[str, Any]) -> str:
    """The path that vLLM's router sees: without ``--root-path``, as in starlette/_utils.py."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path
