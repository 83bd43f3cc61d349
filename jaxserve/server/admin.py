"""Routes for whoever runs the server: they need the admin key, or the machine itself where there is none."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from jaxserve.server.auth import require_admin
from jaxserve.server.limits import read_body
from jaxserve.server.protocol import AbortBody, parse
from jaxserve.server.serving import serving_of

router = APIRouter()


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> dict[str, str]:
    """Forgets every cached prefix that no running request uses."""
    serving = serving_of(request)
    require_admin(request, serving.admin_keys)
    await serving.llm.reset_prefix_cache()
    return {"status": "ok"}


@router.post("/abort_requests")
async def abort_requests(request: Request) -> dict[str, Any]:
    """Ends running requests by the ids of their responses, whole ids only; they finish with the reason "abort"."""
    serving = serving_of(request)
    require_admin(request, serving.admin_keys)
    body = parse(AbortBody, await read_body(request, serving.max_body_bytes))
    found = [name for name in dict.fromkeys(body.request_ids) if serving.llm.abort(name)]
    return {"aborted": found}
