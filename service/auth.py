"""Who is asking: the API key behind a request, and what it may do."""

from __future__ import annotations

from collections.abc import Mapping

from service.errors import ApiError
from service.policy_file import RIGHTS, ApiKey, Policies, Right


def authenticate(policies: Policies, headers: Mapping[str, str]) -> ApiKey | None:
    """Find the key that a request came with; None where there are no keys. Raises ApiError 401.

    It stands in ``Authorization`` as OpenAI's clients send it, or in ``x-api-key`` (LiteLLM) or ``api-key``
    (Azure's clients).

    Without keys in the policy file everybody is let in (and the gateway binds loopback only).
    """
    if not policies.keys:
        return None
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = headers.get("x-api-key") or headers.get("api-key") or ""
    if not token.strip():
        raise _unauthorized("No API key was sent. Send it as 'Authorization: Bearer <key>'.")
    found = policies.key_index.find(token.strip())
    if found is None:
        raise _unauthorized("The API key is not known here.")
    return found


def require(key: ApiKey | None, *rights: Right) -> None:
    """Raises ApiError 403 unless the key has one of these rights; without keys everybody has all of them."""
    held = RIGHTS if key is None else key.rights
    if not set(rights) & set(held):
        raise ApiError(
            403,
            f"The API key does not have the right '{rights[0]}', which this route needs.",
            code="insufficient_rights",
            stage="auth",
            kind="permission_error",
        )


def _unauthorized(message: str) -> ApiError:
    return ApiError(
        401,
        message,
        code="invalid_api_key",
        stage="auth",
        kind="authentication_error",
        headers={"www-authenticate": "Bearer"},
    )
