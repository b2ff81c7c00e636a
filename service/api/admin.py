"""Routes for operators whose API key has the right ``admin``."""

from fastapi import APIRouter, Request

from service.api_schemas import RELOADED
from service.errors import ApiError
from service.gateway import admit, gateway_of
from service.openapi import answers
from service.policy import PolicyError

router = APIRouter()


@router.post("/admin/policies/reload", responses=answers(RELOADED, (401, 403, 409, 500)))
async def reload_policies(request: Request) -> dict[str, list[str]]:
    """Read the policy file again; what is wrong with it is told, and the old policies stay in force."""
    admit(request, "admin")
    try:
        policies = gateway_of(request).store.reload()
    except PolicyError as error:
        raise ApiError(409, str(error), code="policy_file_wrong", stage="request") from error
    return {"policies": list(policies.policies)}
