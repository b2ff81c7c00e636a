"""Who is asking: an API key's tenant and policy."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from service.errors import ApiError
from service.policy import DEFAULT_NAME, Policies


@dataclass(frozen=True)
class Caller:
    """The party behind a request."""

    tenant: str | None
    policy: str


def authenticate(policies: Policies, authorization: str | None) -> Caller:
    """Find the caller of an ``Authorization`` header. Raises ApiError 401.

    Without keys in the policy file everybody is let in (and the gateway binds loopback only). All digests are
    compared, each in constant time, so that the time taken says nothing about which one was close.
    """
    if not policies.keys:
        return Caller(None, DEFAULT_NAME)
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise _unauthorized("No API key was sent. Send it as 'Authorization: Bearer <key>'.")
    digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
    found = None
    for key in policies.keys:
        if hmac.compare_digest(digest, key.sha256):
            found = key
    if found is None:
        raise _unauthorized("The API key is not known here.")
    return Caller(found.tenant, found.policy)


def _unauthorized(message: str) -> ApiError:
    return ApiError(
        401,
        message,
        code="invalid_api_key",
        stage="auth",
        kind="authentication_error",
        headers={"www-authenticate": "Bearer"},
    )
