"""`POST /close_program`: a program (requests with one `program_id`) has no further turns."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from jaxserve.server.limits import read_body
from jaxserve.server.protocol import CloseProgramBody, parse
from jaxserve.server.serving import serving_of, tenant_of

router = APIRouter()


@router.post("/close_program")
async def close_program(request: Request) -> dict[str, str]:
    """Lets go of the KV that is held for the program. Unknown programs are ignored: time may have closed them."""
    serving = serving_of(request)
    body = parse(CloseProgramBody, await read_body(request, serving.max_body_bytes))
    await serving.llm.close_program(body.program_id, tenant=tenant_of(body.user), salt=body.cache_salt or "")
    return {"status": "ok"}
