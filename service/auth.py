"""Who is asking: the API key behind a request, and what it may do."""

from __future__ import annotations

from service.errors import ApiError
from service.policy_file import RIGHTS, ApiKey, Policies, Right


def authenticate(policies: Policies, authorization: str | None) -> ApiKey | None:
    """Find the key of an ``Authorization`` header; None where there are no keys. Raises ApiError 401.

    Without keys in the policy file everybody is let in (and the gateway binds loopback only).
    """
    if not policies.keys:
        return None
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
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
